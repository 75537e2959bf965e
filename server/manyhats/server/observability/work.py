"""What a call has the engine do, as far as its span tells; never what its texts say."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manyhats.engine.output import FinishReason, Usage
    from manyhats.engine.request import SamplingParams, StoppingParams


@dataclass(slots=True)
class Work:
    """A call's generations, scorings and readings together. Times are on ``time.monotonic()``'s clock.

    Attributes:
        kind: what the engine is asked for: ``chat``, ``text``, ``score``, ``embed`` or ``read``; "" until it is.
        base: the name of the base model.
        sampling, stopping: of generations.
        queued_s: when the first request was ready for the engine. first_token_s: when the first token came.
        prompt_tokens, cached_prompt_tokens, generated_tokens: of all that have ended.
        queue_s, adapter_load_s, prefill_s, decode_s: of the one that took longest.
        finish_reasons: of generations, by their numbers.
    """

    kind: str = ""
    base: str = ""
    sampling: SamplingParams | None = None
    stopping: StoppingParams | None = None
    queued_s: float | None = None
    first_token_s: float | None = None
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    queue_s: float = 0.0
    adapter_load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finish_reasons: list[FinishReason] = field(default_factory=list)

    def queued(
        self,
        kind: str,
        base: str,
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
    ) -> None:
        """Note a request that the engine will get."""
        self.kind, self.base, self.sampling, self.stopping = kind, base, sampling, stopping
        if self.queued_s is None:
            self.queued_s = time.monotonic()

    def began(self, time_s: float) -> None:
        """Note a generation's first token."""
        if self.first_token_s is None:
            self.first_token_s = time_s

    def ended(
        self, usage: Usage, finish_reason: FinishReason | None = None, *, is_sibling: bool = False
    ) -> None:
        """Note what a request took, however it ended; a sibling's prompt is another's, too."""
        if not is_sibling:
            self.prompt_tokens += usage.prompt_tokens
            self.cached_prompt_tokens += usage.cached_prompt_tokens
        self.generated_tokens += usage.generated_tokens
        self.queue_s = max(self.queue_s, usage.queue_s)
        self.adapter_load_s = max(self.adapter_load_s, usage.adapter_load_s)
        self.prefill_s = max(self.prefill_s, usage.prefill_s)
        self.decode_s = max(self.decode_s, usage.decode_s)
        if finish_reason is not None:
            self.finish_reasons.append(finish_reason)
