"""Packages that only some data needs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from manyhats.trainer.errors import DataError


def import_for(source: str, module: str) -> Any:
    """Import a module that reading a source needs.

    Raises:
        DataError: it is not installed; says how to get it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            source, None, f"reading it needs the package {package}: pip install {package}"
        ) from error
