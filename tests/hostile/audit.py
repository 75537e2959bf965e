"""What this process opens, as Python's audit hooks tell it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Opened:
    """One opening of a file, or listing of a directory (no flags); the path is as it was given."""

    path: Any
    flags: int


_recorders: list[list[Opened]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _recorders:
        return
    if event == "open":
        seen = Opened(args[0], args[2] if isinstance(args[2], int) else 0)
    elif event in ("os.listdir", "os.scandir"):
        seen = Opened(args[0], os.O_NOFOLLOW)
    else:
        return
    for recorder in _recorders:
        recorder.append(seen)


sys.addaudithook(_hook)  # for good: a hook cannot be taken back


@contextmanager
def recorded_opens() -> Iterator[list[Opened]]:
    """Every opening in the block, by any thread."""
    recorder: list[Opened] = []
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


def leaks(opened: Sequence[Opened], roots: Sequence[Path]) -> list[Opened]:
    """Openings that could have left ``roots``.

    A path must be a root, or below one without a link or ``..`` to lead out of it. A name in an open directory must be
    one step down, and follow no link: whatever is reached by such steps from a root lies under it.
    """
    return [each for each in opened if not _stays(each, roots)]


def _stays(opened: Opened, roots: Sequence[Path]) -> bool:
    if isinstance(opened.path, int):  # what is open already
        return True
    path = Path(os.fsdecode(opened.path))
    if path.is_absolute():
        return ".." not in path.parts and any(path.is_relative_to(root) for root in roots)
    return len(path.parts) == 1 and path.name not in ("", "..") and bool(opened.flags & os.O_NOFOLLOW)
