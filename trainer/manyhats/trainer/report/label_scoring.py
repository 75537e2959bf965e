"""Accuracy over labels, scored by the engine as the server's ``Score`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from manyhats.adapters.artifact import AdapterRecord
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.config import Dtype
from manyhats.engine.engine import Engine
from manyhats.engine.request import ScoreRequest
from manyhats.trainer.data.labels import LabelledItem
from manyhats.trainer.report.served import SavedAdapter, Told, answers


@dataclass(frozen=True, slots=True)
class LabelScores:
    """The prediction for each item: the index of its most likely label."""

    base: tuple[int, ...]
    adapter: tuple[int, ...]


def score_labels(
    model: LoadedModel,
    saved: SavedAdapter,
    items: Sequence[LabelledItem],
    *,
    dtype: Dtype,
    num_threads: int = 0,
    on_progress: Told = lambda done, total: None,
) -> LabelScores:
    """Predict the label of each item with the adapter and with the base alone, in one engine.

    A label's score is the sum of its tokens' log-probabilities after the prompt, including its end; of equal scores the
    first wins.

    Args:
        model: the base.
        saved: the adapter.
        items: prompts with labels; which label is right is not used.
        dtype: of the engine, ``float32`` or ``bfloat16``.
        num_threads: 0 takes one per processor.
        on_progress: called with how many of ``2 · items`` are done; an exception from it ends the scoring.

    Raises:
        EngineError: the engine cannot score them, for example because a prompt is longer than its context.
    """
    predicted = answers(
        model,
        saved,
        [partial(_predict, item, adapter) for adapter in (None, saved.record) for item in items],
        longest=max((item.num_tokens for item in items), default=0),
        dtype=dtype,
        num_threads=num_threads,
        on_progress=on_progress,
    )
    return LabelScores(base=tuple(predicted[: len(items)]), adapter=tuple(predicted[len(items) :]))


async def _predict(item: LabelledItem, adapter: AdapterRecord | None, engine: Engine) -> int:
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
