"""The most that an engine asks of a backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """By these a device with memory of its own divides that.

    Attributes:
        max_rows: of a step.
        max_sequences: that run at once.
        max_draft_rows: rows up to which drafts may fill a step, each of which chooses a token.
        adapter_bytes: of the device's memory, for the adapters in its slots.
        memory_fraction: of the device's memory.
    """

    max_rows: int
    max_sequences: int
    adapter_bytes: int
    memory_fraction: float
    max_draft_rows: int = 0

    @property
    def max_choices(self) -> int:
        """Tokens that a step may choose."""
        return max(self.max_sequences, self.max_draft_rows)
