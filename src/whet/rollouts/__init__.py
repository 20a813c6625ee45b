"""Rollouts: episodes are played, turned into token rows, and handed to an algorithm."""
