"""Environments whose actions are calls of tools: plain classes and functions, each play in a process of its own."""
