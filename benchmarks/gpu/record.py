"""What a part finds: printed as it goes, and kept as JSON, so that a part that is ended leaves what it had."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_WRITE_S = 0.5
"""Between two writes of the file, at least, but for the last."""

Figures = Mapping[str, Any]
"""By name, which has the unit in it; what says which case it is of is among them."""


@dataclass(slots=True)
class Found:
    """All that a part found.

    Attributes:
        part: its name.
        seconds: that it took.
        records: (what, figures) in their order.
        lacks: what it could not do, and why.
        failure: the traceback of what failed first, and the errors of what failed later; empty for none.
    """

    part: str
    seconds: float = 0.0
    records: list[tuple[str, Figures]] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    failure: str = ""

    def of(self, what: str, **figures: object) -> list[Figures]:
        """The records of a kind that have these figures."""
        return [
            each
            for kind, each in self.records
            if kind == what and all(each.get(name) == value for name, value in figures.items())
        ]

    def first(self, what: str, figure: str, **figures: object) -> float | None:
        """A figure of the first of them; None if there is none."""
        found = self.of(what, **figures)
        return found[0].get(figure) if found else None


def path_of(directory: Path, part: str) -> Path:
    """The part's file."""
    return directory / f"{part}.json"


def read(directory: Path, part: str) -> Found:
    """What a part found so far; nothing if it did not run."""
    path = path_of(directory, part)
    if not path.exists():
        return Found(part)
    content = json.loads(path.read_text())
    content["records"] = [(what, figures) for what, figures in content["records"]]
    return Found(**content)


class Recorder:
    """Keeps what one part finds.

    Args:
        directory: of the files.
        part: its name.
        limit_s: until it should end.
        is_short: whether it should leave out what is not needed most.
    """

    def __init__(self, directory: Path, part: str, limit_s: float, *, is_short: bool = False) -> None:
        self.found = Found(part)
        self.is_short = is_short
        self._directory = directory
        self._began_s = self._written_s = time.perf_counter()
        self.limit_s = limit_s
        self._told_late = False

    @property
    def is_late(self) -> bool:
        """Whether the time is over; says so once."""
        is_late = time.perf_counter() - self._began_s > self.limit_s
        if is_late and not self._told_late:
            self._told_late = True
            self.lacks(f"all that would have followed after {self.limit_s:.0f} s")
        return is_late

    @property
    def left_s(self) -> float:
        """Until it should end; at least a little."""
        return max(0.1, self.limit_s - (time.perf_counter() - self._began_s))

    def record(self, what: str, **figures: Any) -> None:
        """Keep figures."""
        self.found.records.append((what, {name: _plain(value) for name, value in figures.items()}))
        self._say(f"{what}: " + ", ".join(f"{name} {_shown(value)}" for name, value in figures.items()))
        if time.perf_counter() - self._written_s > _WRITE_S:
            self.write()

    def lacks(self, what: str) -> None:
        """Keep what is not done, and why."""
        self.found.lacks.append(what)
        self._say(f"left out: {what}")
        self.write()

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Whatever fails within is kept as a failure, and what follows goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - others go on
            self.fail(f"{what}: {error!r}")

    def fail(self, what: str) -> None:
        """Keep the exception being handled as a failure."""
        if not self.found.failure:
            print(traceback.format_exc(), flush=True)
            self.found.failure = traceback.format_exc()
        self.found.failure += f"{what}\n"
        self._say(f"failed: {what}")
        self.write()

    def earlier(self, part: str) -> Found:
        """What another part found."""
        return read(self._directory, part)

    def write(self) -> None:
        """Write the file as of now."""
        self._written_s = time.perf_counter()
        self.found.seconds = round(self._written_s - self._began_s, 2)
        write(self._directory, self.found)

    def _say(self, text: str) -> None:
        print(f"{self.found.part}  {text}", flush=True)


def write(directory: Path, found: Found) -> None:
    """Write a part's file: whole, or not at all."""
    path = path_of(directory, found.part)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(asdict(found), indent=1) + "\n")
    new.replace(path)


def _plain(value: Any) -> Any:
    """What JSON has no number for, by its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "×".join(map(_shown, value))
    return str(value)
