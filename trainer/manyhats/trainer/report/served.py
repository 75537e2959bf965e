"""An artifact as a server would hold it, and an engine's answers with it: what is measured is what is served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from manyhats.adapters.artifact import AdapterRecord, AdapterState, ArtifactPart
from manyhats.adapters.disk.files import open_source
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.heads import TaskKind
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.config import MIB, Dtype, EngineConfig
from manyhats.engine.engine import Engine
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.opening import open_engine
from manyhats.trainer.errors import OutputError

T = TypeVar("T")
Ask = Callable[[Engine], Awaitable[T]]
"""A request, to the engine that answers it."""
Told = Callable[[int, int], None]

_IN_FLIGHT = 64
_MIN_KV_CACHE_BYTES = 256 * MIB
_POSITIONS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class SavedAdapter:
    """An artifact as a server would hold it: read from its directory, checked and lowered."""

    record: AdapterRecord
    lowered: LoweredAdapter


def read_saved(task: str, out: Path, base: BaseDescription) -> SavedAdapter:
    """Read an artifact as a registration would.

    Raises:
        OutputError: a server would refuse it; says why.
    """
    try:
        with open_source(str(out.resolve()), [out.resolve()]) as source:
            read = read_adapter(source, base, AdapterLimits())
    except AdapterError as error:
        raise OutputError(f"{out}: the trained adapter cannot be served: {error}") from error
    artifact, head = read.artifact, read.lowered.head
    record = AdapterRecord(
        task_id=task,
        version=1,
        digest=artifact.digest,
        method=artifact.method,
        state=AdapterState.ACTIVE,
        parts=(ArtifactPart(artifact.digest),),
        size_bytes=artifact.size_bytes,
        num_parameters=artifact.num_parameters,
        source=str(out),
        create_time=datetime.now(UTC),
        base_model=artifact.base_model,
        notes=read.notes,
        kind=TaskKind.GENERATE if head is None else head.kind,
    )
    return SavedAdapter(record, read.lowered)


def answers(
    model: LoadedModel,
    saved: SavedAdapter,
    asks: Sequence[Ask[T]],
    *,
    longest: int,
    dtype: Dtype,
    num_threads: int = 0,
    on_progress: Told = lambda done, total: None,
) -> list[T]:
    """What an engine answers to requests, in their order; it has a bounded number of them in flight.

    Args:
        model: the base.
        saved: the adapter that requests name, if they name one; it shares no memory with the trainer.
        asks: the requests.
        longest: the most tokens of one.
        dtype: of the engine, ``float32`` or ``bfloat16``.
        num_threads: 0 takes one per processor.
        on_progress: called with how many are done, and their number; an exception from it ends it all.

    Raises:
        EngineError: the engine cannot answer, for example because a text is longer than its context.
    """
    config = EngineConfig(
        dtype=dtype, num_threads=num_threads, kv_cache_bytes=_kv_cache_bytes(model.architecture, longest)
    )
    engine = open_engine(model, config, lambda record: saved.lowered)
    progress = _Progress(len(asks), on_progress)
    found = asyncio.run(_answer_all(engine, asks, progress))
    if progress.interrupt is not None:
        raise progress.interrupt
    return [found[index] for index in range(len(asks))]


class _Progress:
    """Counts; keeps an exception from the caller's function until the event loop is left, which it would break."""

    def __init__(self, total: int, tell: Told) -> None:
        self._total = total
        self._tell = tell
        self._done = 0
        self.interrupt: BaseException | None = None

    def add(self) -> None:
        """Count one more as done."""
        self._done += 1
        try:
            self._tell(self._done, self._total)
        except BaseException as error:  # noqa: BLE001 whatever it was, it is raised again
            self.interrupt = self.interrupt or error


async def _answer_all(engine: Engine, asks: Sequence[Ask[T]], progress: _Progress) -> dict[int, T]:
    """The answers by index; some are missing after an interrupt."""
    found: dict[int, T] = {}
    left: Iterator[int] = iter(range(len(asks)))

    async def work() -> None:
        for index in left:
            found[index] = await asks[index](engine)
            progress.add()
            if progress.interrupt is not None:
                return

    await engine.start()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(_IN_FLIGHT):
                group.create_task(work())
    finally:
        await engine.stop()
    return found


def _kv_cache_bytes(architecture: Architecture, longest: int) -> int:
    """Room for several of the longest texts, or for many short ones."""
    positions = max(_POSITIONS, 4 * longest)
    return max(_MIN_KV_CACHE_BYTES, 4 * positions * architecture.kv_values_per_token)
