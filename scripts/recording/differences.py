"""What two recordings do not have in common."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from recording.exact import Recorded

_BEFORE = 20
_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that is not the same; ``what`` says how, in one line."""

    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}"


def differences(was: Recorded, now: Recorded, key: str = "") -> Iterator[Difference]:
    """Each value that differs, or that only one of the two has."""
    if isinstance(was, list) and isinstance(now, list):
        was, now = _numbered(was), _numbered(now)
    if not (isinstance(was, dict) and isinstance(now, dict)):
        if was != now or type(was) is not type(now):
            yield Difference(key, _changed(str(was), str(now)))
        return
    for name in [*was, *(name for name in now if name not in was)]:
        place = f"{key}/{name}" if key else name
        if name not in now:
            yield Difference(place, f"removed; was {_shown(str(was[name]))}")
        elif name not in was:
            yield Difference(place, f"added: {_shown(str(now[name]))}")
        else:
            yield from differences(was[name], now[name], place)


def _numbered(values: list[Recorded]) -> dict[str, Recorded]:
    return {str(index): value for index, value in enumerate(values)}


def _changed(was: str, now: str) -> str:
    """Long texts are shown from a little before where they part."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(was, now, strict=False))
    parting = sum(1 for _ in same)
    start = max(0, parting - _BEFORE) if max(len(was), len(now)) > _SHOWN else 0
    return f"was {_shown(was, start)}, is {_shown(now, start)}"


def _shown(text: str, start: int = 0) -> str:
    rest = text[start : start + _SHOWN]
    return ("…" if start else "") + rest + ("…" if start + _SHOWN < len(text) else "")
