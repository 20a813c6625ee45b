"""The command line: reads words, calls `launch`, prints. Nothing is computed here."""
