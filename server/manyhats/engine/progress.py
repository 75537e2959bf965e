"""Progress reports of long work to its caller."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work proceeds; ``done`` counts up to ``total`` within a stage.

    Stages: ``download`` (bytes), ``dequantize`` (tensors), ``quantize`` (matrices), ``load`` (layers), ``compile``
    (kernels). A total of 0 is not known yet. An exception from it ends the work.
    """

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report; called often, so it must be quick."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


class Stage:
    """A stage run by another program: reported even while that is silent, so that it can be ended."""

    def __init__(self, name: str, progress: Progress, *, total: int = 0) -> None:
        self._name = name
        self._progress = progress
        self.is_at(0, total)

    def is_at(self, done: int, total: int) -> None:
        """Report the progress."""
        self._done, self._total = done, total
        self.is_still_there()

    def is_still_there(self) -> None:
        """Report the same again."""
        self._progress(self._name, self._done, self._total)


class LatestProgress:
    """Forwards reports, and repeats the latest while waiting for work that reports nothing itself."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._latest: tuple[str, int, int] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Forward a report."""
        self._latest = (stage, done, total)
        self._progress(stage, done, total)

    def again(self) -> None:
        """Forward the latest report again."""
        if self._latest is not None:
            self._progress(*self._latest)
