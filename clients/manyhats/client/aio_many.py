"""The asyncio client's calls for many prompts, and for data frames. Their twins are in ``sync_many.py``."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol, Unpack, overload

from manyhats.client import frames
from manyhats.client.encoding_results import ClassifyResult, Embeddings
from manyhats.client.errors import ManyhatsError
from manyhats.client.frames import Frame
from manyhats.client.many import Plan, answer_all, task_of_each
from manyhats.client.requests import (
    ClassifyFrameOptions,
    EmbedFrameOptions,
    GenerateManyOptions,
    OnError,
    Prompt,
    ScoreFrameOptions,
)
from manyhats.client.results import Generation, ScoreResult


class AsksOne(Protocol):
    """The calls for one prompt, which ``AsyncClient`` has."""

    async def generate(self, *args: Any, **options: Any) -> Generation:
        """Generate one answer."""

    async def score(self, *args: Any, **options: Any) -> ScoreResult:
        """Score continuations of one prompt."""

    async def classify(self, *args: Any, **options: Any) -> ClassifyResult:
        """Classify texts."""

    async def embed(self, *args: Any, **options: Any) -> Embeddings:
        """Make vectors of texts."""

    def _timeout(self, timeout_s: float | None) -> float | None: ...

    def _without_retries(self) -> AbstractAsyncContextManager[Any]: ...


class AsyncManyCalls:
    """Calls that send a request for each of many prompts or rows, a few at a time, as ``ManyOptions`` say.

    ``task_id`` is one task for all of them, or one for each, such as a column. With ``on_error`` "raise", the first
    error ends the call, and a note says of which prompt it is; with "return", errors stand in the place of answers.

    A request that the server refuses for now, as when its queue is full, is sent again when the server says. One that
    meets a server that is not available, as while it restarts, is sent again until that has lasted for ``timeout_s``,
    or for a minute if there is none.
    """

    @overload
    async def generate_many(
        self: AsksOne,
        prompts: Iterable[Prompt],
        *,
        task_id: str | Iterable[str] = "",
        on_error: Literal["raise"] = "raise",
        **options: Unpack[GenerateManyOptions],
    ) -> list[Generation]: ...

    @overload
    async def generate_many(
        self: AsksOne,
        prompts: Iterable[Prompt],
        *,
        task_id: str | Iterable[str] = "",
        on_error: OnError,
        **options: Unpack[GenerateManyOptions],
    ) -> list[Generation | ManyhatsError]: ...

    async def generate_many(
        self: AsksOne,
        prompts: Iterable[Prompt],
        *,
        task_id: str | Iterable[str] = "",
        on_error: OnError = "raise",
        **options: Unpack[GenerateManyOptions],
    ) -> Any:
        """Generate an answer to each prompt, and return them in the order of the prompts.

        Args:
            prompts: each text, token ids, or a conversation.
            task_id, on_error: as above.
            options: see ``ManyOptions`` and ``GenerateOptions``, which hold for all prompts.
        """
        return await _ask_each(self, "generate", prompts, task_id, on_error, dict(options), what="prompts")

    async def generate_frame(
        self: AsksOne,
        frame: Frame,
        *,
        prompt: str,
        task_id: str | Iterable[str] = "",
        into: str = "answer",
        on_error: OnError = "raise",
        **options: Unpack[GenerateManyOptions],
    ) -> Frame:
        """Generate an answer to each row of a pandas or Polars frame.

        Args:
            frame: is left as it is.
            prompt: the column of prompts, each text, token ids, or a conversation.
            task_id, on_error: as above.
            into: the column for answers.
            options: see ``ManyOptions`` and ``GenerateOptions``, which hold for all rows.

        Returns:
            A copy with the columns ``into``, ``finish_reason``, ``generated_tokens`` and ``version`` (of the task),
            which replace any of these names; with ``on_error`` "return" also ``error``.
        """
        prompts = frames.column_of(frame, prompt, "prompt")
        answers = await _ask_each(self, "generate", prompts, task_id, on_error, dict(options))
        return frames.with_answers(frame, into, answers, on_error)

    async def score_frame(
        self: AsksOne,
        frame: Frame,
        *,
        prompt: str,
        labels: Iterable[str],
        task_id: str | Iterable[str] = "",
        on_error: OnError = "raise",
        **options: Unpack[ScoreFrameOptions],
    ) -> Frame:
        """Score labels as continuations of each row's prompt; otherwise as ``generate_frame``.

        Args:
            frame: is left as it is.
            prompt: the column of prompts.
            labels: the continuations. Where the model writes a space before them, they begin with one.
            task_id, on_error: as above.
            options: see ``ManyOptions`` and ``PromptOptions``.

        Returns:
            A copy with the columns ``label`` (the likeliest), ``probability`` (its), and one for each label, named
            without white space around, with its probability: the softmax of the labels' log-probabilities.
        """
        texts = frames.labels_of(labels)
        prompts = frames.column_of(frame, prompt, "prompt")
        scores = await _ask_each(self, "score", prompts, task_id, on_error, dict(options), texts)
        return frames.with_scores(frame, texts, scores, on_error)

    async def classify_frame(
        self: AsksOne,
        frame: Frame,
        *,
        text: str,
        task_id: str | Iterable[str],
        on_error: OnError = "raise",
        **options: Unpack[ClassifyFrameOptions],
    ) -> Frame:
        """Classify each row's text by a task with classes; otherwise as ``generate_frame``.

        Returns:
            A copy with the columns ``label`` (the best class), ``score`` (its), and one for each class, with its score.
        """
        texts = [[each] for each in frames.column_of(frame, text, "text")]
        found = await _ask_each(self, "classify", texts, task_id, on_error, dict(options))
        return frames.with_classes(frame, found, on_error)

    async def embed_frame(
        self: AsksOne,
        frame: Frame,
        *,
        text: str,
        task_id: str | Iterable[str] = "",
        into: str = "embedding",
        on_error: OnError = "raise",
        **options: Unpack[EmbedFrameOptions],
    ) -> Frame:
        """Make a vector of each row's text; otherwise as ``generate_frame``.

        Returns:
            A copy with the column ``into``, whose values are lists of numbers.
        """
        texts = [[each] for each in frames.column_of(frame, text, "text")]
        found = await _ask_each(self, "embed", texts, task_id, on_error, dict(options))
        return frames.with_vectors(frame, into, found, on_error)


async def _ask_each(
    client: AsksOne,
    method: str,
    prompts: Iterable[Any],
    task_id: str | Iterable[str],
    on_error: OnError,
    options: dict[str, Any],
    *more: Any,
    what: str = "rows",
) -> list[Any]:
    """Call ``method`` with each prompt (and ``more``), its task, and the options that are not ``ManyOptions``."""
    options["timeout_s"] = client._timeout(options.get("timeout_s"))
    plan = Plan.taken_from(options, what, on_error)
    if isinstance(prompts, str):
        raise TypeError("prompts must be several, not one text")
    given = list(prompts)

    rows = list(zip(given, task_of_each(task_id, len(given)), strict=True))
    # What is to be sent again is decided for all rows together.
    async with client._without_retries() as once:
        call = getattr(once, method)

        async def ask(row: tuple[Any, str], timeout_s: float | None) -> Any:
            return await call(row[0], *more, task_id=row[1], timeout_s=timeout_s, **options)

        return await answer_all(rows, ask, plan)
