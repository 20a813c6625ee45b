"""Algorithms: generators that yield a `Step`. Each file holds one algorithm and nothing else."""
