"""Data: sources (files, folders, the hub) give rows, formats make typed examples of them."""
