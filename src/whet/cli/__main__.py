"""`python -m whet.cli`."""

from whet.cli.app import main

main()
