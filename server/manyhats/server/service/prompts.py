"""Prompts from callers, their limits, and how they become token ids."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.request import MAX_CONTINUATIONS, MAX_INPUTS
from manyhats.engine.text.chat_template import ChatMessage, Rendering
from manyhats.engine.text.ending import PROBES, Ends, find_ends
from manyhats.engine.text.prompt_text import TAIL_LENGTH, Continuation, ScoreTokens, score_tokens
from manyhats.engine.text.tokenizer import ReadText
from manyhats.server.service.conversations import MAX_TEXT_BYTES, ChatPrompt, check_size
from manyhats.server.service.text_threads import BRIEF_LENGTH, TextThreads, slices

if TYPE_CHECKING:
    from manyhats.engine.text.prompt_text import PromptText
    from manyhats.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text; ``field`` is its name in the request, ``first`` a text before it that it makes a pair with."""

    text: str
    add_special_tokens: bool = True
    field: str = "text"
    first: str | None = None

    def __post_init__(self) -> None:
        if not self.text:
            raise FieldInvalidError(self.field, "must not be empty")
        check_size(self.field, len(self.text.encode()))


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, used as they are; ``field`` is their name in the request."""

    ids: Sequence[int]
    field: str = "token_ids"

    def __post_init__(self) -> None:
        if not self.ids:
            raise FieldInvalidError(f"{self.field}.ids", "must not be empty")


@dataclass(frozen=True, slots=True)
class _RenderedChat:
    """A conversation as rendered by its template, including special tokens."""

    text: str
    add_special_tokens: ClassVar[bool] = False
    field: ClassVar[str] = ChatPrompt.field


Prompt = TextPrompt | TokenPrompt | ChatPrompt
_Text = TextPrompt | ChatPrompt | _RenderedChat


def check_continuations(texts: Collection[str]) -> None:
    """Check the number of a prompt's continuations, and their total length.

    Args:
        texts: each one's; "" for one given as tokens.

    Raises:
        FieldInvalidError: there are none, too many, or they are too long.
    """
    if not 1 <= len(texts) <= MAX_CONTINUATIONS:
        raise FieldInvalidError("continuations", f"must have 1 to {MAX_CONTINUATIONS}, not {len(texts)}")
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes > MAX_TEXT_BYTES:
        raise FieldInvalidError(
            "continuations", f"have {num_bytes} bytes together; the limit is {MAX_TEXT_BYTES}"
        )


def check_num_inputs(num_inputs: int, field: str = "inputs") -> None:
    """Check how many texts are to be read.

    Raises:
        FieldInvalidError: ``field``: too many, or none.
    """
    if not 1 <= num_inputs <= MAX_INPUTS:
        raise FieldInvalidError(field, f"must have 1 to {MAX_INPUTS}, not {num_inputs}")


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns the prompts of one request into tokens.

    Attributes:
        tokenizer: the task's, or the base's.
        threads: where texts are tokenized.
        vocab_size: token ids are below.
        max_tokens: of each prompt and continuation; more can never be served. None for no limit.
        render: renders a conversation by a task's own template; None leaves it to the tokenizer.
    """

    tokenizer: Tokenizer
    threads: TextThreads
    vocab_size: int
    max_tokens: int | None = None
    render: Callable[[Sequence[ChatMessage], Rendering], Awaitable[str]] | None = None

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt.

        Raises:
            FieldInvalidError: an id is outside the vocabulary, it has no tokens, or the chat template refused.
            PromptTooLongError: it has too many; if its length already shows that, it was not tokenized.
        """
        if isinstance(prompt, TokenPrompt):
            return await self.threads.run(partial(self._ids, prompt), _length(prompt))
        text = await self._text(prompt)
        return (await self.threads.run(partial(self._encode, text), _length(text))).token_ids

    async def read(self, prompt: Prompt, *, truncates: bool = False) -> ReadText:
        """The tokens of a text that is read whole: with the special tokens before and after it, alone or in its pair.

        Args:
            prompt: the text.
            truncates: whether one that is too long is cut; token ids and conversations never are.

        Raises:
            FieldInvalidError: as ``encode``.
            PromptTooLongError: likewise.
        """
        if not isinstance(prompt, TextPrompt):
            return ReadText(await self.encode(prompt))
        if not truncates:
            await self._check_length(prompt)
        work = partial(self._read, prompt, truncates)
        return await self.threads.run(work, len(prompt.text) + len(prompt.first or ""))

    async def encode_scoring(
        self, prompt: Prompt, continuations: Sequence[TextPrompt | TokenPrompt]
    ) -> ScoreTokens:
        """The tokens of a prompt and of its continuations to score; each is limited as in ``encode``.

        Raises:
            FieldInvalidError: as ``encode``; or a continuation leaves nothing of the prompt before it.
            PromptTooLongError: likewise.
        """
        rendered = prompt if isinstance(prompt, TokenPrompt) else await self._text(prompt)
        for each in continuations:
            await self._check_length(each)
        run = self.threads.run
        ids, text, again = await run(partial(self._ahead, rendered), _length(rendered))
        found: list[Continuation] = []
        # In pieces, between which others get a turn, and after which nothing more is done for a caller that has left.
        for some, length in _pieces(continuations, again):
            found += await run(partial(self._behind, ids, text, some), length)
        return score_tokens(ids, found)

    async def encode_answers(
        self, prompt: TextPrompt | ChatPrompt, answers: Sequence[str], ends: Ends
    ) -> ScoreTokens:
        """The tokens of a prompt and of answers to it, each with the token that ends it; limited as in ``encode``.

        Raises:
            FieldInvalidError: as ``encode``; or an answer has no tokens, or leaves nothing of the prompt before it.
            PromptTooLongError: likewise.
        """
        text = await self._text(prompt)
        length = _length(text) + sum(map(len, answers)) + TAIL_LENGTH * len(answers)
        return await self.threads.run(partial(self._answered, text, answers, ends), length)

    async def ends(self, eos_token_ids: frozenset[int]) -> Ends:
        """How answers end.

        Raises:
            ModelError: nothing ends them.
        """
        if self.render is None:
            return find_ends(self.tokenizer, eos_token_ids)
        try:
            rendered = [await self.render(messages, rendering) for messages, rendering in PROBES]
        except FieldInvalidError:
            rendered = []
        return find_ends(self.tokenizer, eos_token_ids, rendered)

    async def _text(self, prompt: TextPrompt | ChatPrompt) -> _Text:
        """The text to tokenize, checked to be short enough as far as its length tells."""
        text: _Text = prompt
        if isinstance(prompt, ChatPrompt) and self.render is not None:
            text = _RenderedChat(await self.render(prompt.messages, prompt.rendering))
        await self._check_length(text)
        return text

    async def _check_length(self, prompt: Prompt | _RenderedChat) -> None:
        """Refuse a long text that cannot fit, before waiting for others to be tokenized."""
        if self.max_tokens is None or not isinstance(prompt, TextPrompt | _RenderedChat):
            return
        if len(prompt.text) > BRIEF_LENGTH:
            work = partial(self.tokenizer.check_length, prompt.text, self.max_tokens)
            with _named(prompt):
                await self.threads.run(work, BRIEF_LENGTH)

    # On a thread

    def _encode(self, prompt: _Text) -> PromptText:
        with _named(prompt):
            if isinstance(prompt, ChatPrompt):
                text = self.tokenizer.chat_prompt(
                    prompt.messages, rendering=prompt.rendering, max_tokens=self.max_tokens
                )
            else:
                special = prompt.add_special_tokens
                text = self.tokenizer.prompt(
                    prompt.text, add_special_tokens=special, max_tokens=self.max_tokens
                )
        if not text.token_ids:
            raise FieldInvalidError(prompt.field, "has no tokens")
        return text

    def _read(self, prompt: TextPrompt, truncates: bool) -> ReadText:
        with _named(prompt):
            read = self.tokenizer.read(
                prompt.text,
                add_special_tokens=prompt.add_special_tokens,
                max_tokens=self.max_tokens,
                first=prompt.first,
                truncates=truncates,
            )
        if not read.token_ids:
            raise FieldInvalidError(prompt.field, "has no tokens")
        return read

    def _answered(self, prompt: _Text, answers: Sequence[str], ends: Ends) -> ScoreTokens:
        text = self._encode(prompt)
        found: list[Continuation] = []
        for answer in answers:
            said, end = ends.split(answer)
            try:
                behind = text.followed_by(said)
            except FieldInvalidError as error:
                raise FieldInvalidError(prompt.field, f"the answer {answer!r} {error.description}") from error
            last = ends.token_id if end is None else end
            found.append(Continuation(behind.num_prompt_tokens, (*behind.token_ids, last)))
        return score_tokens(text.token_ids, found)

    def _ahead(self, prompt: _Text | TokenPrompt) -> tuple[tuple[int, ...], PromptText | None, int]:
        """Tokens of a prompt with continuations; its text, if known, and how much of that is tokenized again."""
        if isinstance(prompt, TokenPrompt):
            return self._ids(prompt), None, 0
        text = self._encode(prompt)
        return text.token_ids, text, text.length_again

    def _behind(
        self,
        ids: tuple[int, ...],
        prompt: PromptText | None,
        continuations: Sequence[TextPrompt | TokenPrompt],
    ) -> list[Continuation]:
        return [self._continuation(ids, prompt, each) for each in continuations]

    def _continuation(
        self, ids: tuple[int, ...], prompt: PromptText | None, continuation: TextPrompt | TokenPrompt
    ) -> Continuation:
        """Continuations of a prompt; ``prompt`` is None if its text is not known."""
        if isinstance(continuation, TokenPrompt):
            return Continuation(len(ids), self._ids(continuation))
        field, text = continuation.field, continuation.text
        try:
            with _named(continuation):
                if self.max_tokens is not None:
                    self.tokenizer.check_length(text, self.max_tokens)
                if prompt is None:
                    found = Continuation(len(ids), self.tokenizer.followed_by(text))
                else:
                    found = prompt.followed_by(text)
        except FieldInvalidError as error:
            raise FieldInvalidError(field, error.description) from error
        if self.max_tokens is not None and len(found.token_ids) > self.max_tokens:
            raise PromptTooLongError(field, len(found.token_ids), self.max_tokens)
        return found

    def _ids(self, prompt: TokenPrompt) -> tuple[int, ...]:
        with _named(prompt):
            if self.max_tokens is not None and len(prompt.ids) > self.max_tokens:
                raise PromptTooLongError(prompt.field, len(prompt.ids), self.max_tokens)
        ids: list[int] = []
        for part in slices(prompt.ids):
            for token_id in (min(part), max(part)):
                if not 0 <= token_id < self.vocab_size:
                    raise FieldInvalidError(
                        f"{prompt.field}.ids",
                        f"has {token_id}; token ids are at least 0 and below {self.vocab_size}",
                    )
            ids.extend(part)
        return tuple(ids)


@contextmanager
def _named(prompt: Prompt | _RenderedChat) -> Iterator[None]:
    """Name the field of a text that is too long; a prompt has one, whatever its kind."""
    try:
        yield
    except PromptTooLongError as error:
        field = prompt.field if prompt.field.startswith("continuations") else "prompt"
        raise PromptTooLongError(field, error.num_tokens, error.limit, at_least=error.at_least) from None


def _pieces(
    continuations: Sequence[TextPrompt | TokenPrompt], again: int
) -> Iterator[tuple[list[TextPrompt | TokenPrompt], int]]:
    """Consecutive continuations that take some milliseconds together, and their length with the prompt's part of it."""
    piece: list[TextPrompt | TokenPrompt] = []
    total = 0
    for each in continuations:
        length = _length(each) + again
        if piece and total + length > BRIEF_LENGTH:
            yield piece, total
            piece, total = [], 0
        piece.append(each)
        total += length
    yield piece, total


def _length(prompt: Prompt | _RenderedChat) -> int:
    match prompt:
        case TokenPrompt():
            return len(prompt.ids) // 64  # nothing to tokenize, but each is checked
        case TextPrompt() | _RenderedChat():
            return len(prompt.text)
        case ChatPrompt():
            return prompt.length
