"""An engine without a model: its steps run on a decoder that hashes what it reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import EngineError
from manyhats.engine.loop.generation import Generation
from manyhats.engine.loop.job import Event, Job
from manyhats.engine.loop.scoring import Scoring
from manyhats.engine.loop.serving import ServingModel
from manyhats.engine.loop.step import Step
from manyhats.engine.output import FinishReason, ScoreOutput, StepOutput, StepStats
from manyhats.engine.request import Request, ScoreRequest
from manyhats.engine.residency.lease import Lease, ResidentAdapter
from manyhats.engine.sampling.matcher import Grammar
from manyhats.engine.scheduling.blocks import BlockAllocator
from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.tiny_models import EOS_TOKEN_ID, TINY_VOCAB_SIZE
from support.fakes.ahead import AheadCache, AheadModel, AheadSlots, Device, watch_blocks
from support.fakes.engine import FakeCache, FakeDecoder, KeptSlot
from support.harnesses.backends import ahead_seed
from support.harnesses.engine import random_ids
from support.harnesses.grammars import grammar_of

POISON = TINY_VOCAB_SIZE - 1
"""A token that turns the logits of its sequence to NaN."""


@dataclass
class Loop:
    """An engine without a model, and everything it said of each job; with a seed, it runs one step ahead."""

    tokenizer: Tokenizer
    num_blocks: int = 64
    block_size: int = 4
    config: SchedulerConfig = field(
        default_factory=lambda: SchedulerConfig(
            max_num_sequences=8, max_num_batched_tokens=16, max_waiting=20
        )
    )

    ahead: int | None = field(default_factory=ahead_seed)

    def __post_init__(self) -> None:
        self.decoder = FakeDecoder(TINY_VOCAB_SIZE, poison=(POISON,))
        self.device = Device(self.ahead or 0)
        model: Any = self.decoder
        cache: Any = FakeCache(self.num_blocks, self.block_size)
        slots: Any = SimpleNamespace()
        if self.ahead is not None:
            model, cache = AheadModel(model, self.device), AheadCache(cache, self.device)
            slots = AheadSlots(slots, self.device)
        allocator = watch_blocks(BlockAllocator(self.num_blocks, self.block_size), self.device)
        self.steps = Step(
            Scheduler(self.config, allocator),
            model,
            cache,
            slots,
            TINY_VOCAB_SIZE,
            runs_ahead=self.ahead is not None,
        )
        self.serving = ServingModel(
            base_digest="sha256:0",
            tokenizer=self.tokenizer,
            eos_token_ids=frozenset({EOS_TOKEN_ID}),
            max_context_length=self.num_blocks * self.block_size,
            vocab_size=TINY_VOCAB_SIZE,
        )
        self.grammars: dict[bytes, Grammar] = {}
        self.events: dict[str, list[Event]] = {}
        self.stats: list[StepStats] = []

    def add(self, job: Job[Any]) -> str:
        return self._hear(self.steps.add(job), job.id)

    def generate(self, name: str, request: Request, slot: int = 0) -> str:
        matcher = None if request.constraint is None else self._grammar_of(request.constraint).matcher()
        return self.add(Generation(name, request, lease_of(slot), self.serving, matcher=matcher))

    def _grammar_of(self, constraint: Constraint) -> Grammar:
        if constraint.digest not in self.grammars:
            serving = self.serving
            self.grammars[constraint.digest] = grammar_of(
                constraint, serving.tokenizer, serving.vocab_size, serving.eos_token_ids
            )
        return self.grammars[constraint.digest]

    def score(self, name: str, request: ScoreRequest, slot: int = 0) -> str:
        return self.add(Scoring(name, request, lease_of(slot), self.serving))

    def cancel(self, name: str) -> None:
        self._hear(self.steps.cancel(name), name)

    def step(self) -> None:
        result = self.steps.run()
        if result.stats is not None:
            self.stats.append(result.stats)
        self._hear(result.events, "")

    def land(self) -> None:
        """Take a turn more if a step is in flight, which is over then."""
        if self.steps.is_in_flight:
            self.step()

    def drain(self) -> None:
        for _ in range(3000):
            if not self.steps.has_work:
                assert self.steps.scheduler.allocator.num_used == 0
                assert not self.device.mistakes, self.device.mistakes
                return
            self.step()
        raise AssertionError("the jobs do not end")

    def _hear(self, events: Iterable[Event], name: str) -> str:
        for event in events:
            self.events.setdefault(event.job_id, []).append(event)
        return name

    def token_ids(self, name: str) -> list[int]:
        outputs = [event.payload for event in self.events.get(name, ())]
        return [t.id for output in outputs if isinstance(output, StepOutput) for t in output.tokens]

    def text(self, name: str) -> str:
        outputs = [event.payload for event in self.events[name]]
        return "".join(output.text for output in outputs if isinstance(output, StepOutput))

    def last(self, name: str) -> StepOutput | ScoreOutput:
        event = self.events[name][-1]
        assert event.is_last
        assert isinstance(event.payload, StepOutput | ScoreOutput), event.payload
        return event.payload

    def finish_reason(self, name: str) -> FinishReason | None:
        output = self.last(name)
        assert isinstance(output, StepOutput)
        return output.finish_reason

    def error(self, name: str) -> EngineError:
        event = self.events[name][-1]
        assert event.is_last
        assert isinstance(event.payload, EngineError), event.payload
        assert sum(other.is_last for other in self.events[name]) == 1
        return event.payload


def lease_of(slot: int) -> Lease:
    """A lease of an adapter that has a slot, or of none for slot 0."""
    return Lease(ResidentAdapter(placement=cast(Any, KeptSlot(slot)))) if slot else Lease()


def prompt(seed: int, length: int = 9) -> list[int]:
    return random_ids(seed, length, POISON)


def score_request(token_ids: list[int], continuations: list[list[int]], **fields: Any) -> ScoreRequest:
    return ScoreRequest(
        id="score",
        prompt_token_ids=tuple(token_ids),
        continuations=tuple(tuple(continuation) for continuation in continuations),
        **fields,
    )
