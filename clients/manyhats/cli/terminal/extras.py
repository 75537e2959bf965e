"""Commands that need more than the client's packages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manyhats.cli.terminal.failures import CommandError


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Guards the imports of a command that needs ``manyhats[extra]``.

    Raises:
        CommandError: a third-party package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "manyhats":
            raise
        raise CommandError(
            f"this command needs more packages ({package} is missing): {_how_to_install(extra)}"
        ) from error


def _how_to_install(extra: str) -> str:
    """How to install an extra: manyhats is not on an index, so it comes from where it was installed from."""
    checkout = Path(__file__).parents[4]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -c constraints.txt --editable '.[{extra}]' in {checkout}"
    return f"install manyhats[{extra}] from the checkout or wheel that it came from"


def quiet_libraries() -> None:
    """Suppress advice from other packages that would mislead here.

    bitsandbytes recommends a package whose kernels are not used, the Hugging Face hub a token that nothing here needs.
    """
    for name in ("bitsandbytes.backends.cpu.ops", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
