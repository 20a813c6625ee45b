"""Judges: whoever can be asked is asked which answer is better, and only a verdict that can be read counts."""
