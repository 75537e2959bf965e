"""Progress of long work on stderr: bars at a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import typer

from manyhats.cli.terminal.output import human_bytes


class Report(Protocol):
    """The engine's ``Progress``, which is not imported for a name."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Record how much of a stage is done."""


_BYTE_STAGES = frozenset({"download", "upload"})


@contextmanager
def shown_progress() -> Iterator[Report]:
    """Shows what is reported to it while entered; may be called from any one thread."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _stage_lines()


@contextmanager
def shown_wait() -> Iterator[Callable[[str], None]]:
    """At a terminal, shows how long the command has waited for an answer, and any text it is given; gone at the end."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        waiting = progress.add_task("waiting", total=None)
        yield lambda text: progress.update(waiting, description=text)


@contextmanager
def _bars() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.fields[amount]:>20}"),
        TimeElapsedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total or None, amount="")
            progress.update(
                tasks[stage], completed=done, total=total or None, amount=amount(stage, done, total)
            )

        yield report


def _stage_lines() -> Report:
    begun: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        if stage not in begun:
            begun.add(stage)
            typer.echo(f"{stage} ...", err=True)

    return report


def amount(stage: str, done: int, total: int) -> str:
    """``12 / 210``, or ``1.2 MB / 90.0 MB`` if the stage counts bytes; a total of 0 is unknown."""
    show: Callable[[int], str] = human_bytes if stage in _BYTE_STAGES else str
    return f"{show(done)} / {show(total)}" if total else show(done)
