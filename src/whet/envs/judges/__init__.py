"""Judges: a chat client decides which answer is better; only a verdict that can be parsed counts."""
