"""``python -m manyhats``: the same as ``manyhats``."""

from manyhats.cli.main import main

main()
