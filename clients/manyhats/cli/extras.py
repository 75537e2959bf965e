"""Commands that need more than the client's packages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from manyhats.cli.failures import CommandError


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Guards the imports of a command that needs ``manyhats[extra]``.

    Raises:
        CommandError: a package of another project is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "manyhats":
            raise
        raise CommandError(
            f"this command needs more packages ({package} is missing): pip install 'manyhats[{extra}]'"
        ) from error


def quiet_libraries() -> None:
    """Leave out advice of other packages that would mislead here.

    bitsandbytes recommends a package whose kernels are not used, the Hugging Face hub a token that nothing here needs.
    """
    for name in ("bitsandbytes.backends.cpu.ops", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
