"""How good each of the encoder's tasks is, in ``results.json`` as it was when it was trained; ``table`` shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.results import size

_FILE = "results.json"
_HEADER = (
    "| task | method | head | base | accuracy | F1 (vectors: MRR) | size | training |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderResult:
    """One task's training and what came of it.

    Attributes:
        method, head: what was trained.
        num_items: held-out rows.
        before, after: the trainer's metrics of the base, which has none with a head of classes, and of the task.
        num_bytes: of the artifact's files.
        seconds: of the training.
    """

    method: str
    head: str
    num_items: int
    before: Mapping[str, float] | None
    after: Mapping[str, float]
    num_bytes: int
    seconds: float


def read_results(root: Path) -> dict[str, EncoderResult]:
    """By task; none where there is no file yet."""
    path = root / _FILE
    if not path.exists():
        return {}
    content: Mapping[str, Mapping[str, object]] = json.loads(path.read_text(encoding="utf-8"))
    return {task: EncoderResult(**fields) for task, fields in content.items()}  # type: ignore[arg-type]


def write_result(root: Path, task: str, result: EncoderResult) -> None:
    """Put a task's result among the others."""
    results = {**read_results(root), task: result}
    content = {name: asdict(results[name]) for name in sorted(results)}
    (root / _FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(results: Mapping[str, EncoderResult]) -> list[str]:
    """The lines of a table in Markdown."""
    return [*_HEADER, *(_row(task, result) for task, result in results.items())]


def _row(task: str, result: EncoderResult) -> str:
    second = result.after.get("f1", result.after.get("mrr", 0.0))
    cells = (
        f"`{task}`",
        result.method,
        result.head,
        "" if result.before is None else _percent(result.before["accuracy"]),
        _percent(result.after["accuracy"]),
        f"{second:.2f}",
        size(result.num_bytes),
        f"{result.seconds:.0f} s",
    )
    return "| " + " | ".join(cells) + " |"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
