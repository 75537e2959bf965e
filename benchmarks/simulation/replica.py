"""One server of many: the scheduler, the blocks and the residency that serve; only what computes is simulated."""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.simulation.events import Events
from benchmarks.simulation.machine import Machine
from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.reserved_labels import EQUAL, Entitlement
from manyhats.engine.config import DEFAULT_KV_CACHE_BYTES, EngineConfig
from manyhats.engine.errors import QueueFullError
from manyhats.engine.residency.lease import Lease
from manyhats.engine.residency.residency import AdapterResidency
from manyhats.engine.scheduling.blocks import BlockAllocator
from manyhats.engine.scheduling.schedule import Schedule
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus
from manyhats.load.run import LEFT, OK
from manyhats.load.workload import Arrival

_PAUSED_S = 0.05
"""How long the engine's thread sleeps while everything that waits is held back."""
_TOKEN = 7
"""Every generated one."""


@dataclass(slots=True, eq=False)
class Call:
    """A request on its way through a replica.

    Attributes:
        number: counts a replica's.
        arrival: what is asked.
        came_s: when.
        is_preparing: whether it waits for its adapter.
        sequence: its, once its adapter is loaded.
        first_s: when its first token came; negative if none has.
        outcome: as in ``manyhats.load``; empty until it has ended.
    """

    number: int
    arrival: Arrival
    came_s: float
    is_preparing: bool = False
    lease: Lease | None = None
    sequence: Sequence | None = None
    first_s: float = -1.0
    outcome: str = ""


class Watch:
    """Told of what happens in a replica; does nothing itself."""

    def queued(self, sequence: Sequence) -> None:
        """A sequence waits in the scheduler."""

    def stepped(self, schedule: Schedule) -> None:
        """A step has run, and its sequences have not moved on yet."""

    def ended(self, call: Call) -> None:
        """A call has its one end."""


@dataclass(frozen=True, slots=True)
class _Packed:
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Slots:
    """Adapters take memory and no time but to load."""

    num_bytes: int
    memory: None = None

    def pack(self, lowered: LoweredAdapter) -> _Packed:
        return _Packed(self.num_bytes)

    def place(self, slot: int, packed: _Packed) -> None:
        pass

    def clear(self, slot: int) -> None:
        pass


@dataclass(slots=True)
class SchedulingTime:
    """Processor time of the scheduler's own code.

    Attributes:
        seconds: in all.
        num_steps: that were scheduled.
    """

    seconds: float = 0.0
    num_steps: int = 0
    _began: float = field(default=0.0, repr=False)

    def __enter__(self) -> None:
        self._began = time.thread_time()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.thread_time() - self._began


class Replica:
    """A server, from the arrival of a request to its end.

    Args:
        events: the simulated clock.
        records: the tasks' adapters; the base has none.
        machine: how long what computes takes.
        config: of the server.
        entitlements: of tasks; those not named are equal.
        watch: told of what happens.

    Attributes:
        records: as given.
        scheduler, residency: those of the engine.
        scheduling: what the scheduler itself took.
    """

    def __init__(
        self,
        events: Events,
        records: Mapping[str, AdapterRecord],
        *,
        machine: Machine,
        config: EngineConfig,
        entitlements: Mapping[str, Entitlement] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._events = events
        self.records = records
        self._machine = machine
        self._entitlements = entitlements or {}
        self._watch = watch or Watch()
        cache_bytes = config.kv_cache_bytes or DEFAULT_KV_CACHE_BYTES
        num_blocks = cache_bytes // (config.block_size * machine.kv_token_bytes)
        self.scheduler = Scheduler(
            config.scheduler, BlockAllocator(num_blocks, config.block_size), clock=events.clock
        )
        slots: Any = _Slots(machine.adapter_bytes)
        self.residency = AdapterResidency(
            slots,
            config.max_loaded_adapters,
            config.max_adapter_bytes,
            lambda record: LoweredAdapter(record.digest, ()),
            num_blocks * config.block_size,
            self.scheduler.forget,
        )
        self.residency.call_on_room(self._serve_loads)
        self.scheduling = SchedulingTime()
        self._loads: OrderedDict[str, list[Call]] = OrderedDict()  # that have not begun, by digest
        self._num_preparing = 0
        self._calls: dict[str, Call] = {}
        self._deadlines: list[tuple[float, int, Call]] = []
        self._num_asked = 0
        self._is_busy = False

    @property
    def num_unfinished(self) -> int:
        """Calls that have not ended."""
        return len(self._calls) + self._num_preparing

    def ask(self, arrival: Arrival, deadline_s: float | None = None) -> None:
        """A request comes now."""
        now_s = self._events.now_s
        self._num_asked += 1
        call = Call(self._num_asked, arrival, now_s)
        if deadline_s is not None:
            heapq.heappush(self._deadlines, (now_s + deadline_s, call.number, call))
            self._events.after(deadline_s, self._wake)
        record = self.records.get(arrival.task)
        call.lease = Lease() if record is None else self.residency.try_lease(record)
        try:
            if call.lease is not None:
                self._queue(call)
            elif record is not None:
                self.scheduler.check_queue(arrival.task, self._num_preparing)
                self._prepare(call, +1)
                self._lease(call, record, may_load=not self._loads)
        except QueueFullError:
            self._end(call, "QUEUE_FULL")

    # Adapters, as ``AdapterLoading`` has them loaded

    def _lease(self, call: Call, record: AdapterRecord, *, may_load: bool) -> bool:
        """Have a call wait for its adapter's load, or else for room to load it."""
        lease = self.residency.lease(record, partial(self._load, record) if may_load else None)
        if lease is None:
            self._loads.setdefault(record.digest, []).append(call)
            return False
        call.lease = lease
        lease.adapter.loaded.add_done_callback(lambda loaded: self._loaded(call))
        return True

    def _load(self, record: AdapterRecord) -> None:
        self._events.after(self._machine.load_s, lambda: self.residency.fill(record))

    def _serve_loads(self) -> None:
        while self._loads:
            digest, calls = next(iter(self._loads.items()))
            del self._loads[digest]
            while calls:
                call = calls[0]
                if not call.outcome and not self._lease(call, self.records[call.arrival.task], may_load=True):
                    self._loads[digest] = calls  # with itself at the head
                    self._loads.move_to_end(digest, last=False)
                    return
                calls.pop(0)

    def _loaded(self, call: Call) -> None:
        if call.outcome:
            self._release(call)
            return
        self._prepare(call, -1)
        self._queue(call, has_waited=True)

    def _prepare(self, call: Call, change: int) -> None:
        call.is_preparing = change > 0
        self._num_preparing += change

    # The queue

    def _queue(self, call: Call, *, has_waited: bool = False) -> None:
        arrival, lease, task = call.arrival, call.lease, call.arrival.task
        assert lease is not None
        num_prompt = arrival.prompt.count(" ") + 1
        sequence = Sequence(
            id=str(call.number),
            token_ids=list(range(call.number, call.number + num_prompt)),
            max_num_tokens=num_prompt + arrival.num_tokens,
            cache_key=task.encode(),
            placement=lease.placement,
            task=task,
            entitlement=self._entitlements.get(task, EQUAL),
            arrival=call.came_s,
            has_waited=has_waited,
        )
        with self.scheduling:
            self.scheduler.add(sequence)
        call.sequence = sequence
        self._calls[sequence.id] = call
        self._watch.queued(sequence)
        self._wake()

    def _wake(self) -> None:
        """Begin a step, unless one runs; it begins in an event of its own, with all that comes at this time."""
        if not self._is_busy and self.scheduler.has_work:
            self._is_busy = True
            self._events.after(0.0, self._step)

    def _step(self) -> None:
        self._expire()
        with self.scheduling:
            schedule = self.scheduler.schedule()
        for sequence in schedule.hopeless:
            self._end(self._calls[sequence.id], "DEADLINE_EXCEEDED")
        self._is_busy = False
        if schedule.chunks:
            self.scheduling.num_steps += 1
            self._is_busy = True
            self._events.after(self._machine.step(schedule), partial(self._ran, schedule))
        elif self.scheduler.has_work:
            self._events.after(_PAUSED_S, self._wake)

    def _ran(self, schedule: Schedule) -> None:
        self._watch.stepped(schedule)
        chosen = [chunk.sequence for chunk in schedule.chunks if chunk.ends_tokens]
        with self.scheduling:
            self.scheduler.commit(schedule)
            going_on = [each for each in chosen if each.status is SequenceStatus.RUNNING]
            for sequence in going_on:
                self.scheduler.append_tokens(sequence, _TOKEN)
        for sequence in going_on:
            self._take(self._calls[sequence.id], sequence)
        self._is_busy = False
        self._wake()

    def _take(self, call: Call, sequence: Sequence) -> None:
        """Note a new token of a call."""
        num_tokens = sequence.num_output_tokens
        if num_tokens == 1:
            call.first_s = self._events.now_s
        if sequence.num_tokens == sequence.max_num_tokens:
            self._end(call, OK)
        elif num_tokens == call.arrival.cancel_after:
            self._end(call, LEFT)

    def _expire(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._events.now_s:
            _, _, call = heapq.heappop(self._deadlines)
            if not call.outcome:
                self._end(call, "DEADLINE_EXCEEDED")

    def _end(self, call: Call, outcome: str) -> None:
        assert not call.outcome, "a call has one end"
        call.outcome = outcome
        if call.sequence is not None:
            del self._calls[call.sequence.id]
            with self.scheduling:
                self.scheduler.finish(call.sequence)
        if call.is_preparing:
            self._prepare(call, -1)  # a lease that it has is returned once the load has ended
        else:
            self._release(call)
        self._watch.ended(call)

    def _release(self, call: Call) -> None:
        if call.lease is not None:
            call.lease.release()
