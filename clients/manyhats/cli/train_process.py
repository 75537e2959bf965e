"""The process of ``manyhats train``: how its memory is allocated."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_VARIABLE = "GLIBC_TUNABLES"
# glibc keeps small freed chunks in separate lists, unmerged. Torch's tensors are aligned, and each leaves such a scrap
# beside it: the holes between scraps are too small for the next tensor of that size, and the heap grows by a layer's
# tensors at every layer. Without these lists it stays at what is in use; the speed is the same.
_TUNABLES = {"glibc.malloc.mxfast": "0", "glibc.malloc.tcache_count": "0"}


def restart_with_steady_heap(arguments: Sequence[str]) -> None:
    """Run the command again, in this process, with glibc's lists of small chunks off; once, and only for ``train``.

    They are read when a process starts. Without glibc, or if a user has set them, nothing happens.

    Args:
        arguments: of the command line, without the program.
    """
    if arguments[:1] != ["train"] or not _has_glibc():
        return
    given = os.environ.get(_VARIABLE, "")
    if any(name in given for name in _TUNABLES):
        return
    ours = ":".join(f"{name}={value}" for name, value in _TUNABLES.items())
    os.environ[_VARIABLE] = f"{given}:{ours}" if given else ours
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError):
        return False
