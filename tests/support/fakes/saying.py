"""An engine without a model that answers each task with a text of its own, as fast as a real one might."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field

from manyhats.engine.output import EngineStats, FinishReason, StepOutput, StepStats, TokenOutput, Usage
from manyhats.engine.request import Request
from support.fakes.server import EchoEngine


@dataclass
class SayingEngine(EchoEngine):
    """``texts``: task id → its answer, "" for the base model; ``on_step`` is told of steps."""

    texts: Mapping[str, str] = field(default_factory=dict)
    step_s: float = 0.03
    on_step: Callable[[StepStats], None] | None = None
    _asked: set[str] = field(default_factory=set)

    @property
    def stats(self) -> EngineStats:
        stats = super().stats
        return EngineStats(self.running, 0, 210 + 14 * self.running, 60, 1024, stats.heartbeat_s, ())

    async def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(request)
        self.running += 1
        task = request.adapter.task_id if request.adapter is not None else ""
        self._asked.add(task)
        words = re.findall(r"\s*\S+", self.texts.get(task, "I have nothing to say."))
        num_prompt = len(request.prompt_token_ids)
        try:
            for index, word in enumerate(words):
                await asyncio.sleep(self.step_s)
                if self.on_step is not None:
                    self.on_step(StepStats(self.step_s, 0, self.running, 0, len(self._asked - {""}), 0, 0, 0))
                yield StepOutput(
                    text=word,
                    tokens=(TokenOutput(index + 5, word),),
                    prompt_tokens=(),
                    finish_reason=FinishReason.EOS if index == len(words) - 1 else None,
                    usage=Usage(num_prompt, 0, index + 1, 0.001, 0.002, self.step_s * index, 0.0),
                    time_s=time.monotonic(),
                )
        finally:
            self.running -= 1
            self._asked.discard(task)
            self.closed.append(request.id)
