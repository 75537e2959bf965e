"""Where the engine keeps what it fetches and builds."""

from __future__ import annotations

import os
from pathlib import Path


def default_home() -> Path:
    """Where fetched models and NF4 weights are kept: ``$MANYHATS_HOME``, else ``~/.cache/manyhats``."""
    configured = os.environ.get("MANYHATS_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "manyhats"
