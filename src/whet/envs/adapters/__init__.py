"""Environments of other frameworks. What is here runs in an interpreter that has them, with nothing else of whet."""
