"""Launch: builds the world a recipe runs in, and the few functions behind the commands."""
