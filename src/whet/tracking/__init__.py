"""Tracking: files that are the truth about a run, and the ways of showing them."""
