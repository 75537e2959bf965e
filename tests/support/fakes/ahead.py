"""A backend that runs ahead without a device: it computes late, and notes whatever is taken from it too early."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.backends.wants import NO_WANTS, Outcome, Wants
from manyhats.engine.scheduling.blocks import BlockAllocator


@dataclass(eq=False)
class Launched:
    """A step, from its forward until it is collected."""

    plan: StepPlan
    cache: Any
    adapters: Any
    before: Launched | None
    blocks: frozenset[int]
    slots: frozenset[int]
    wants: Wants = NO_WANTS
    outcome: Outcome | None = None
    error: BaseException | None = None

    @property
    def is_computed(self) -> bool:
        return self.outcome is not None or self.error is not None

    def tokens(self) -> list[int]:
        """What a later plan's −1 − i stands for; 0 where there is none."""
        if self.outcome is None:
            return [0] * self.wants.choices.num_rows
        return [max(token.id, 0) for token in self.outcome.tokens]


@dataclass(eq=False)
class Device:
    """The steps in flight, and what went wrong with them.

    Attributes:
        mistakes: of the caller: something that a step in flight names was changed, or named wrongly.
        most_in_flight: at once, when one more had been launched.
    """

    seed: int = 0
    launched: deque[Launched] = field(default_factory=deque)
    mistakes: list[str] = field(default_factory=list)
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def check_blocks(self, block_ids: Iterable[int], what: str) -> None:
        """Blocks are about to change, or to be anybody's."""
        named = {block for step in tuple(self.launched) for block in step.blocks}
        self.check(named.isdisjoint(block_ids), f"{what} of a step in flight")

    def check_slot(self, slot: int, what: str) -> None:
        """A slot is about to change."""
        self.check(
            all(slot not in step.slots for step in tuple(self.launched)), f"slot {slot} {what} in flight"
        )

    def check(self, is_right: bool, what: str) -> None:
        if not is_right:
            self.mistakes.append(what)


class AheadModel:
    """Computes each step at once, when the next one is launched, or when its outcome is asked for: a seed says which.

    An error of a step is raised where a device would: at once by ``finish``, otherwise by ``result``.
    """

    def __init__(self, model: Any, device: Device) -> None:
        self.model = model
        self.device = device
        self._last: Launched | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def warm_up(self, cache: AheadCache, adapters: AheadSlots, *others: Any) -> None:
        self.model.warm_up(cache.cache, adapters.slots, *others)

    def forward(self, plan: StepPlan, cache: AheadCache, adapters: AheadSlots) -> AheadLogits:
        device = self.device
        if device.random.random() < 0.5:
            self.catch_up()
        device.check_blocks((target for _, target in plan.block_copies), "a copy over a block")
        device.check(len(device.launched) < 2, "three steps are in flight")
        before = device.launched[-1] if device.launched else None
        num_choices = 0 if before is None else before.wants.choices.num_rows
        device.check(
            bool((plan.token_ids >= -num_choices).all()), "no step in flight chooses a token of the plan"
        )
        device.check(before is None or before is self._last, "a step before the last is in flight alone")
        step = Launched(
            plan, cache.cache, adapters.slots, before, _blocks(plan, cache.block_size), _slots(plan)
        )
        self._last = step
        device.launched.append(step)
        device.most_in_flight = max(device.most_in_flight, len(device.launched))
        return AheadLogits(self, step)

    def catch_up(self, last: Launched | None = None) -> None:
        """Compute what is launched, in order, up to a step."""
        for step in tuple(self.device.launched):
            if not step.is_computed:
                self._compute(step)
            if step is last:
                return

    def _compute(self, step: Launched) -> None:
        token_ids, chosen = step.plan.token_ids.copy(), step.before.tokens() if step.before else []
        for row in (token_ids < 0).nonzero()[0]:
            token_ids[row] = chosen[-1 - token_ids[row]]
        step.before = None
        try:
            logits = self.model.forward(replace(step.plan, token_ids=token_ids), step.cache, step.adapters)
            step.outcome = logits.finish(step.wants).result()
        except BaseException as error:  # noqa: BLE001 the step's, whoever asks for its outcome
            step.error = error


class AheadLogits:
    """``Logits`` of a step that is not computed yet."""

    def __init__(self, model: AheadModel, step: Launched) -> None:
        self._model = model
        self._step = step

    def finish(self, wants: Wants) -> AheadPending:
        model, step = self._model, self._step
        step.wants = wants
        if model.device.random.random() < 0.3:
            model.catch_up(step)
            if step.error is not None:
                model.device.launched.remove(step)
                raise step.error
        return AheadPending(model, step)


class AheadPending:
    """``Pending`` of a step that may not be computed yet."""

    def __init__(self, model: AheadModel, step: Launched) -> None:
        self._model = model
        self._step = step

    def result(self) -> Outcome:
        model, step = self._model, self._step
        launched = model.device.launched
        model.catch_up(step)
        if step in launched:
            launched.remove(step)
        if step.error is not None:
            raise step.error
        assert step.outcome is not None
        return step.outcome


class AheadCache:
    """A cache whose writes are checked."""

    def __init__(self, cache: Any, device: Device) -> None:
        self.cache = cache
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def write(self, blocks: Seq[int], keys: Tensor, values: Tensor) -> None:
        self._device.check_blocks(blocks, "a write to a block")
        self.cache.write(blocks, keys, values)


class AheadSlots:
    """Slots whose changes are checked."""

    def __init__(self, slots: Any, device: Device) -> None:
        self.slots = slots
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slots, name)

    def place(self, slot: int, packed: Any) -> None:
        self._device.check_slot(slot, "filled")
        self.slots.place(slot, packed)

    def clear(self, slot: int) -> None:
        self._device.check_slot(slot, "cleared")
        self.slots.clear(slot)


class AheadBackend:
    """Another backend, run ahead."""

    runs_ahead = True

    def __init__(self, backend: Backend, seed: int = 0) -> None:
        self.backend = backend
        self.device = Device(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def prepare(self, *arguments: Any) -> Any:
        return AheadModel(self.backend.prepare(*arguments), self.device)

    def new_cache(self, *arguments: Any) -> Any:
        return AheadCache(self.backend.new_cache(*arguments), self.device)

    def new_adapters(self, *arguments: Any) -> Any:
        return AheadSlots(self.backend.new_adapters(*arguments), self.device)


def watch_blocks(allocator: BlockAllocator, device: Device) -> BlockAllocator:
    """Have it noted when a block becomes free that a step in flight names."""
    free, clear = allocator.free, allocator.clear

    def watched_free(block_ids: Iterable[int]) -> None:
        given_up = tuple(block_ids)
        free(given_up)
        device.check_blocks((each for each in given_up if not allocator.num_refs(each)), "a free block")

    def watched_clear() -> None:
        device.check(not device.launched, "all blocks are free and a step is in flight")
        clear()

    allocator.free, allocator.clear = watched_free, watched_clear  # type: ignore[method-assign]
    return allocator


def _blocks(plan: StepPlan, block_size: int) -> frozenset[int]:
    tables = zip(plan.block_tables.tolist(), plan.context_len.tolist(), strict=True)
    named = {block for table, length in tables for block in table[: -(-length // block_size)]}
    return frozenset(named.union(*plan.block_copies) if plan.block_copies else named)


def _slots(plan: StepPlan) -> frozenset[int]:
    return frozenset(plan.row_slots.tolist()) - {0}
