"""Whether an artifact was made for the resident base, by the name that it records."""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from manyhats.adapters.errors import BaseMismatchError, shown
from manyhats.adapters.sites import BaseDescription

# A Windows path counts as one everywhere: adapters travel.
_DRIVE = re.compile(r"[A-Za-z]:")


def is_path(name: str) -> bool:
    """Whether a recorded base is a path: by its form, or because it exists.

    Anything else is a name like ``org/name``, whatever letters and spaces it has.
    """
    return has_form_of_path(name) or os.path.exists(name)


def has_form_of_path(name: str) -> bool:
    """Whether it is absolute, begins with ``.`` or ``~``, or is not two parts with one slash between."""
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith("/")
        or name.count("/") != 1
        or "\\" in name
        or _DRIVE.match(name) is not None
    )


def names_of_directory(path: str) -> frozenset[str]:
    """What an artifact may call a local base: its path as it is given, absolute, and with its links resolved."""
    expanded = os.path.expanduser(path)
    return frozenset((path, expanded, os.path.abspath(expanded), os.path.realpath(expanded)))


def is_known_name(name: str, base: BaseDescription) -> bool:
    """Whether ``name`` is one of the base's, ignoring case."""
    return _folded(name) in {_folded(known) for known in base.names}


def is_registered_for(names: Collection[str], base: BaseDescription) -> bool:
    """Whether ``names``, as given by ``identity`` when a version was registered, are those of this base."""
    return not frozenset(names).isdisjoint(identity(base))


def identity(base: BaseDescription) -> tuple[str, ...]:
    """What a base is known by, its digest first: any of them identifies it."""
    return (base.digest, *sorted(base.names))


def public_name(base: BaseDescription) -> str:
    """What to call the base in texts that callers read: never a path; empty if it has no other name."""
    return min((name for name in base.names if not is_path(name)), default="")


def check_base_name(
    name: str, base: BaseDescription, key: str = "base_model_name_or_path", *, assume_base: bool = False
) -> tuple[str, ...]:
    """Compare the recorded name with the base's.

    A name like ``org/name`` must be one of the base's. No name, or a local path, says nothing: that is accepted on the
    shapes alone, with a note.

    Args:
        name: as the artifact records it.
        base: the resident one.
        key: of the config that records it.
        assume_base: the operator says that it is meant for this base: any name is accepted, with a note.

    Returns:
        Notes for the operator.

    Raises:
        BaseMismatchError: it names another model.
    """
    if name and is_known_name(name, base):
        return ()
    if not name:
        return ("the artifact does not name its base model; only the shapes were checked",)
    if is_path(name):
        return (f"the artifact names its base by a path, '{shown(name)}'; only the shapes were checked",)
    if assume_base:
        return (
            f"the artifact names '{shown(name)}' as its base; it was registered with assume_base, and only the "
            "shapes were checked",
        )
    known = ", ".join(sorted(each for each in base.names if not is_path(each)))
    own = f"is known as {shown(known)}" if known else "has no name, only a path"
    raise BaseMismatchError(
        key,
        f"was made for '{shown(name)}', and this server's base {own}; if they are the same "
        "model, register it with assume_base (--assume-base), or start the server with --base-name",
    )


def _folded(name: str) -> str:
    return name.rstrip("/").casefold() or name
