"""Sampling: the embedded engine, OpenAI-compatible endpoints, and a scripted sampler for tests."""
