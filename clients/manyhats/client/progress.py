"""Progress of long calls: told to the caller's own function, or shown as a bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from manyhats.client.requests import Progress


@contextmanager
def shown(progress: Progress | bool | None, what: str, *, in_bytes: bool = False) -> Iterator[Progress]:
    """What to tell how much is done of how much: ``progress`` itself, if it is a function.

    If it is True, that draws a bar on stderr while entered, where stderr is a terminal or this is a notebook.

    Args:
        progress: see above; False and None show nothing.
        what: is counted, such as "prompts".
        in_bytes: whether they are bytes.
    """
    if callable(progress):
        yield progress
    elif progress:
        with _bar(what, in_bytes) as report:
            yield report
    else:
        yield _ignore


def _ignore(done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def _bar(what: str, in_bytes: bool) -> Iterator[Progress]:
    # Only here: it takes longer to import than the client.
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _ignore
        return
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn() if in_bytes else rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
