"""Accuracy over labels, scored by the engine as the server's ``Score`` does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from manyhats.adapters.artifact import AdapterRecord, AdapterState, ArtifactPart
from manyhats.adapters.disk.files import open_source
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.config import MIB, Dtype, EngineConfig
from manyhats.engine.engine import Engine
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.opening import open_engine
from manyhats.engine.request import ScoreRequest
from manyhats.trainer.data.labels import LabelledItem
from manyhats.trainer.errors import OutputError

_IN_FLIGHT = 64
_MIN_KV_CACHE_BYTES = 256 * MIB
_POSITIONS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class SavedAdapter:
    """An artifact as a server would hold it: read from its directory, checked and lowered."""

    record: AdapterRecord
    lowered: LoweredAdapter


@dataclass(frozen=True, slots=True)
class LabelScores:
    """The prediction for each item: the index of its most likely label."""

    base: tuple[int, ...]
    adapter: tuple[int, ...]


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
    artifact = read.artifact
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
    )
    return SavedAdapter(record, read.lowered)


def score_labels(
    model: LoadedModel,
    saved: SavedAdapter,
    items: Sequence[LabelledItem],
    *,
    dtype: Dtype,
    num_threads: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LabelScores:
    """Predict the label of each item with the adapter and with the base alone, in one engine.

    A label's score is the sum of its tokens' log-probabilities after the prompt, including its end; of equal scores the
    first wins.

    Args:
        model: the base.
        saved: the adapter, which shares no memory with the trainer.
        items: prompts with labels; which label is right is not used.
        dtype: of the engine, ``float32`` or ``bfloat16``.
        num_threads: 0 takes one per processor.
        on_progress: called with how many of ``2 · items`` are done; an exception from it ends the scoring.

    Raises:
        EngineError: the engine cannot score them, for example because a prompt is longer than its context.
    """
    longest = max((item.num_tokens for item in items), default=0)
    config = EngineConfig(
        dtype=dtype, num_threads=num_threads, kv_cache_bytes=_kv_cache_bytes(model.architecture, longest)
    )
    engine = open_engine(model, config, lambda record: saved.lowered)
    progress = _Progress(2 * len(items), on_progress)
    predicted = asyncio.run(_score_all(engine, saved.record, items, progress))
    if progress.interrupt is not None:
        raise progress.interrupt
    return LabelScores(base=tuple(predicted[: len(items)]), adapter=tuple(predicted[len(items) :]))


class _Progress:
    """Counts; keeps an exception from the caller's function until the event loop is left, which it would break."""

    def __init__(self, total: int, tell: Callable[[int, int], None]) -> None:
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


async def _score_all(
    engine: Engine,
    record: AdapterRecord,
    items: Sequence[LabelledItem],
    progress: _Progress,
) -> list[int]:
    """The label of each item by the base, then by the adapter, with a bounded number in flight."""
    asks = [(item, adapter) for adapter in (None, record) for item in items]
    predicted = [0] * len(asks)
    left: Iterator[int] = iter(range(len(asks)))

    async def work() -> None:
        for index in left:
            item, adapter = asks[index]
            predicted[index] = await _predict(engine, item, adapter)
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
    return predicted


async def _predict(engine: Engine, item: LabelledItem, adapter: AdapterRecord | None) -> int:
    tokens = item.score_tokens
    output = await engine.score(
        ScoreRequest(
            id="",
            prompt_token_ids=tokens.prompt_token_ids,
            continuations=tokens.continuations,
            num_given=tokens.num_given,
            adapter=adapter,
        )
    )
    logprobs = [score.logprob for score in output.scores]
    return logprobs.index(max(logprobs))


def _kv_cache_bytes(architecture: Architecture, longest: int) -> int:
    """Room for several of the longest prompts, or for many short ones."""
    positions = max(_POSITIONS, 4 * longest)
    return max(_MIN_KV_CACHE_BYTES, 4 * positions * architecture.kv_values_per_token)
