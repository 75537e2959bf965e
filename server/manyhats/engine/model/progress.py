"""How long work tells its caller how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work proceeds; ``done`` counts up to ``total`` within a stage.

    Stages: ``download`` (bytes), ``dequantize``, ``quantize`` (matrices), ``load`` (layers).
    """

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report; it is called often and must be quick."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report to nobody."""
