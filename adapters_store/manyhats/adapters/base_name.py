"""Whether an artifact was made for the resident base, by the name that it records."""

from __future__ import annotations

import re

from manyhats.adapters.errors import BaseMismatchError, shown
from manyhats.adapters.sites import BaseDescription

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")


def is_known_name(name: str, base: BaseDescription) -> bool:
    """Whether ``name`` is one of the base's, in any case of letters."""
    return name.casefold() in {known.casefold() for known in base.names}


def check_base_name(
    name: str, base: BaseDescription, key: str = "base_model_name_or_path"
) -> tuple[str, ...]:
    """Compare the recorded name with the base's.

    A name like ``org/name`` must be one of the base's. No name, or a local path, tells nothing: that is
    accepted on the shapes alone, and noted.

    Args:
        name: as the artifact records it.
        base: the resident one.
        key: of the config that records it.

    Returns:
        Notes for the operator.

    Raises:
        BaseMismatchError: it names another model.
    """
    if is_known_name(name, base):
        return ()
    if not name:
        return ("the artifact does not name its base model; only the shapes were checked",)
    if _HUB_ID.fullmatch(name):
        known = ", ".join(sorted(base.names)) or "nothing"
        raise BaseMismatchError(
            key,
            f"was made for '{shown(name)}', and this server's base is known as {shown(known)}; "
            "if they are the same model, start the server with --base-name",
        )
    return (f"the artifact names its base by a path, '{shown(name)}'; only the shapes were checked",)
