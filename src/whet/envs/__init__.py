"""Tasks, environments and rewards in message space: no tokens but their number, no weights, no torch."""
