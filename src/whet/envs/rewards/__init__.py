"""Rewards, one file each. `build` makes a rubric of them from a recipe."""
