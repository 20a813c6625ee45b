"""Training: the four verbs on one machine, optimizers, micro-batches, and the data gate."""
