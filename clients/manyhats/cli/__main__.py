"""``python -m manyhats.cli``: the same as ``manyhats``."""

from manyhats.cli.main import main

main()
