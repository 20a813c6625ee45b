"""Evaluations: statistics of sampled answers, and the rows of the comparison table."""
