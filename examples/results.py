"""How good each example task is, in ``results.json`` as it was when it was trained; ``table`` shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_FILE = "results.json"
_HEADER = (
    "| task | method | trained by | base | asked in words | task | size | training |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleResult:
    """One task's training and what came of it.

    Attributes:
        method: as in ``describe``'s first words.
        library: that trained it.
        num_items: held-out messages.
        base, instructed, task: right answers to them: of the base to the message alone, of the base asked in words, of
            the task.
        num_bytes: of what was trained, config and weights.
        seconds: of the training.
    """

    method: str
    library: str
    num_items: int
    base: int
    instructed: int
    task: int
    num_bytes: int
    seconds: float


def read_results(root: Path) -> dict[str, ExampleResult]:
    """By task; none where there is no file yet."""
    path = root / _FILE
    if not path.exists():
        return {}
    content: Mapping[str, Mapping[str, object]] = json.loads(path.read_text(encoding="utf-8"))
    return {task: ExampleResult(**fields) for task, fields in content.items()}  # type: ignore[arg-type]


def write_result(root: Path, task: str, result: ExampleResult) -> None:
    """Put a task's result among the others."""
    results = {**read_results(root), task: result}
    content = {name: asdict(results[name]) for name in sorted(results)}
    (root / _FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(results: Mapping[str, ExampleResult]) -> list[str]:
    """The lines of a table in Markdown."""
    return [*_HEADER, *(_row(task, result) for task, result in results.items())]


def _row(task: str, result: ExampleResult) -> str:
    shares = (
        f"{100 * right / result.num_items:.0f} %" for right in (result.base, result.instructed, result.task)
    )
    cells = (
        f"`{task}`",
        result.method,
        result.library,
        *shares,
        size(result.num_bytes),
        f"{result.seconds:.0f} s",
    )
    return "| " + " | ".join(cells) + " |"


def size(num_bytes: int) -> str:
    """Of files, for a table."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.0f} kB"
