"""The kinds of stages, one file each: how it runs, what it checks ahead, what it needs, how it is shown."""
