"""`python -m whet`."""

from whet.cli.app import main

main()
