"""The blocking client's calls for many prompts, and for data frames. Their twins are in ``aio_many.py``."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, Unpack, overload

from manyhats.client.errors import ManyhatsError
from manyhats.client.frames import Frame
from manyhats.client.requests import (
    ClassifyFrameOptions,
    EmbedFrameOptions,
    GenerateManyOptions,
    OnError,
    Prompt,
    ScoreFrameOptions,
)
from manyhats.client.results import Generation

if TYPE_CHECKING:
    from manyhats.client.aio import AsyncClient

T = TypeVar("T")


class RunsAsync(Protocol):
    """What ``Client`` adds."""

    def _run(self, ask: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        """What ``ask`` returns of an asyncio client of the same server."""


class ManyCalls:
    """Calls that send a request for each of many prompts or rows, a few at a time, as ``ManyOptions`` say.

    ``task_id`` is one task for all of them, or one for each, such as a column. With ``on_error`` "raise", the first
    error ends the call, and a note says of which prompt it is; with "return", errors stand in the place of answers.

    A request that the server refuses for now, as when its queue is full, is sent again when the server says. One that
    meets a server that is not available, as while it restarts, is sent again until that has lasted for ``timeout_s``,
    or for a minute if there is none.
    """

    @overload
    def generate_many(
        self: RunsAsync,
        prompts: Iterable[Prompt],
        *,
        task_id: str | Iterable[str] = "",
        on_error: Literal["raise"] = "raise",
        **options: Unpack[GenerateManyOptions],
    ) -> list[Generation]: ...

    @overload
    def generate_many(
        self: RunsAsync,
        prompts: Iterable[Prompt],
        *,
        task_id: str | Iterable[str] = "",
        on_error: OnError,
        **options: Unpack[GenerateManyOptions],
    ) -> list[Generation | ManyhatsError]: ...

    def generate_many(
        self: RunsAsync,
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
        return self._run(
            lambda client: client.generate_many(prompts, task_id=task_id, on_error=on_error, **options)
        )

    def generate_frame(
        self: RunsAsync,
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
        return self._run(
            lambda client: client.generate_frame(
                frame, prompt=prompt, task_id=task_id, into=into, on_error=on_error, **options
            )
        )

    def score_frame(
        self: RunsAsync,
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
        return self._run(
            lambda client: client.score_frame(
                frame, prompt=prompt, labels=labels, task_id=task_id, on_error=on_error, **options
            )
        )

    def classify_frame(
        self: RunsAsync,
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
        return self._run(
            lambda client: client.classify_frame(
                frame, text=text, task_id=task_id, on_error=on_error, **options
            )
        )

    def embed_frame(
        self: RunsAsync,
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
        return self._run(
            lambda client: client.embed_frame(
                frame, text=text, task_id=task_id, into=into, on_error=on_error, **options
            )
        )
