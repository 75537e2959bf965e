"""The default model as ``make setup`` leaves it; fetched on first use where it did not."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from manyhats.engine.checkpoints.fetch import locate_model
from manyhats.engine.home import default_home

DEFAULT_MODEL = "smollm2-135m-instruct"


@cache
def default_model_directory() -> Path:
    """Its Hugging Face directory."""
    return locate_model(DEFAULT_MODEL, default_home()).directory
