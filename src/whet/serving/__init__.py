"""Serving: OpenAI's chat completions over HTTP, for whatever answers them."""
