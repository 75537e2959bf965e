"""What a request costs: time in the queue, to the first token and after it, and tokens."""

from __future__ import annotations

import time

from manyhats.engine.output import Usage


class Meter:
    """Measures one request.

    Args:
        accepted_s: when it came, on ``time.monotonic()``'s clock.
        num_prompt_tokens: without virtual tokens.
        adapter_load_s: how long it waited for its adapter.
    """

    def __init__(self, accepted_s: float, num_prompt_tokens: int, adapter_load_s: float) -> None:
        self._accepted_s = accepted_s
        self._num_prompt_tokens = num_prompt_tokens
        self._adapter_load_s = adapter_load_s
        self._num_cached_tokens = 0
        self._started_s: float | None = None
        self._prefilled_s: float | None = None
        self._num_drafts = self._num_right_drafts = 0

    def start(self, num_cached_tokens: int) -> None:
        """Note that a chunk is about to run; the first one ends its time in the queue."""
        if self._started_s is None:
            self._started_s = time.monotonic()
            self._num_cached_tokens = min(num_cached_tokens, self._num_prompt_tokens)

    def end_prefill(self, now_s: float | None = None) -> None:
        """Note that the prompt has run: now, or at the start if that is not known. Only the first call counts."""
        if self._prefilled_s is None:
            self._prefilled_s = self._started_s if now_s is None else now_s

    def note_drafts(self, num_drafts: int, num_right: int) -> None:
        """Count a step's drafts, and those of them that came."""
        self._num_drafts += num_drafts
        self._num_right_drafts += num_right

    def usage(self, now_s: float, num_generated_tokens: int = 0) -> Usage:
        """The usage so far."""
        started_s = now_s if self._started_s is None else self._started_s
        prefilled_s = now_s if self._prefilled_s is None else self._prefilled_s
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            cached_prompt_tokens=self._num_cached_tokens,
            generated_tokens=num_generated_tokens,
            queue_s=0.0 if self._started_s is None else self._started_s - self._accepted_s,
            prefill_s=prefilled_s - started_s,
            decode_s=now_s - prefilled_s,
            adapter_load_s=self._adapter_load_s,
            draft_tokens=self._num_drafts,
            accepted_draft_tokens=self._num_right_drafts,
        )
