"""Writes the tables of docs/settings.md anew, from the settings as they are declared.

With ``--check`` it writes nothing, shows how the page differs from what it would be, and exits 1 if it does.
"""

from __future__ import annotations

import sys
from pathlib import Path

from generated_file import write_or_check
from manyhats.server.lifetime.config import SETTINGS as SERVE
from manyhats.settings.printing import table
from manyhats.trainer.settings.settings import SETTINGS as TRAIN

PAGE = Path(__file__).parents[1] / "docs/settings.md"
TABLES = {"## A server": SERVE, "## A training": TRAIN}


def with_tables(text: str) -> str:
    """The page with what follows its headings, up to the next, replaced by tables."""
    for heading, settings in TABLES.items():
        before, _, rest = text.partition(f"{heading}\n")
        _, mark, after = rest.partition("\n## ")
        text = f"{before}{heading}\n\n{table(settings)}{mark}{after}"
    return text


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, with_tables(PAGE.read_text(encoding="utf-8")), "write_settings.py"))
