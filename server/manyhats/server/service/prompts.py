"""Prompts as callers give them, their limits, and how they become token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.text.prompt_text import Continuation, ScoreTokens, score_tokens
from manyhats.engine.text.tokenizer import ChatMessage, Tokenizer
from manyhats.server.service.ports import Backend, PromptText
from manyhats.server.service.text_threads import BRIEF_LENGTH, slices

MAX_TEXT_BYTES = 1024 * 1024
MAX_CHAT_MESSAGES = 1024
MAX_ROLE_LENGTH = 64
# What a template writes around each message, in characters.
_MESSAGE_LENGTH = 32


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text; ``field`` is its name in the request."""

    text: str
    add_special_tokens: bool = True
    field: str = "text"

    def __post_init__(self) -> None:
        if not self.text:
            raise FieldInvalidError(self.field, "must not be empty")
        _check_size(self.field, len(self.text.encode()))


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, used as they are; ``field`` is their name in the request."""

    ids: Sequence[int]
    field: str = "token_ids"

    def __post_init__(self) -> None:
        if not self.ids:
            raise FieldInvalidError(f"{self.field}.ids", "must not be empty")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, oldest message first."""

    messages: tuple[ChatMessage, ...]
    field: ClassVar[str] = "chat.messages"

    def __post_init__(self) -> None:
        if not 1 <= len(self.messages) <= MAX_CHAT_MESSAGES:
            raise FieldInvalidError(
                self.field, f"must have 1 to {MAX_CHAT_MESSAGES} messages, not {len(self.messages)}"
            )
        for index, message in enumerate(self.messages):
            if not 1 <= len(message.role) <= MAX_ROLE_LENGTH:
                raise FieldInvalidError(
                    f"chat.messages[{index}].role", f"must have 1 to {MAX_ROLE_LENGTH} characters"
                )
        _check_size(self.field, self.num_bytes)

    @property
    def num_bytes(self) -> int:
        """All contents together, in UTF-8."""
        return sum(len(message.content.encode()) for message in self.messages)


@dataclass(frozen=True, slots=True)
class _RenderedChat:
    """A conversation as its template wrote it, special tokens included."""

    text: str
    field: ClassVar[str] = ChatPrompt.field


Prompt = TextPrompt | TokenPrompt | ChatPrompt
_Encodable = Prompt | _RenderedChat


async def encode_prompts(
    backend: Backend,
    prompts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer | None = None,
    max_tokens: int | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of prompts, in order.

    Args:
        backend: has the base's tokenizer, and threads.
        prompts: of one request.
        tokenizer: the task's own; None is the base's.
        max_tokens: of each; a prompt of more can never be served.

    Raises:
        FieldInvalidError: an id is outside the vocabulary, a prompt has no tokens, or the chat template refused.
        PromptTooLongError: a prompt has more tokens; where its length already tells, it was not tokenized.
    """
    rendered = [await _rendered(backend, prompt, tokenizer) for prompt in prompts]
    backend = _with_tokenizer(backend, tokenizer)
    await _check_lengths(backend, rendered, max_tokens)
    work = partial(_encode_all, backend, rendered, max_tokens)
    return await backend.text_threads.run(work, sum(map(_length, rendered)))


async def encode_scoring(
    backend: Backend,
    prompt: Prompt,
    continuations: Sequence[TextPrompt | TokenPrompt],
    *,
    tokenizer: Tokenizer | None = None,
    max_tokens: int | None = None,
) -> ScoreTokens:
    """The tokens of a prompt and of what is scored behind it; limited as ``encode_prompts`` limits each.

    Raises:
        FieldInvalidError: as ``encode_prompts``; or a continuation leaves nothing of the prompt ahead of it.
        PromptTooLongError: likewise.
    """
    rendered = await _rendered(backend, prompt, tokenizer)
    backend = _with_tokenizer(backend, tokenizer)
    await _check_lengths(backend, [rendered, *continuations], max_tokens)
    run = backend.text_threads.run
    ids, text, again = await run(partial(_encode_ahead, backend, rendered, max_tokens), _length(rendered))
    found: list[Continuation] = []
    # In pieces, between which others have their turn, and after which nothing is done for a caller that has left.
    for some, length in _pieces(continuations, again):
        found += await run(partial(_continuations, backend, ids, text, some, max_tokens), length)
    return score_tokens(ids, found)


async def _check_lengths(backend: Backend, prompts: Sequence[_Encodable], max_tokens: int | None) -> None:
    """Refuse long texts that cannot fit, ahead of all those that are waiting to be tokenized."""
    if max_tokens is None:
        return
    for prompt in prompts:
        if isinstance(prompt, (TextPrompt, _RenderedChat)) and len(prompt.text) > BRIEF_LENGTH:
            work = partial(_check_length, backend, prompt, max_tokens)
            await backend.text_threads.run(work, BRIEF_LENGTH)


def _check_length(backend: Backend, prompt: TextPrompt | _RenderedChat, max_tokens: int) -> None:
    try:
        backend.tokenizer.check_length(prompt.text, max_tokens)
    except PromptTooLongError as error:
        raise _named(error, prompt) from None


def _named(error: PromptTooLongError, prompt: _Encodable) -> PromptTooLongError:
    """The error with the name of the field; the engine has one word for whichever kind of prompt it is."""
    field = prompt.field if prompt.field.startswith("continuations") else "prompt"
    return PromptTooLongError(field, error.num_tokens, error.limit, at_least=error.at_least)


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


async def _rendered(backend: Backend, prompt: Prompt, tokenizer: Tokenizer | None) -> _Encodable:
    """A conversation as text, where the template is a task's own; other prompts as they are."""
    if not isinstance(prompt, ChatPrompt) or tokenizer is None or not tokenizer.has_own_template:
        return prompt
    if backend.task_tokenizers is None:
        raise TypeError("a task's tokenizer, without what renders its template")
    return _RenderedChat(await backend.task_tokenizers.render(tokenizer, prompt.messages))


def _with_tokenizer(backend: Backend, tokenizer: Tokenizer | None) -> Backend:
    return backend if tokenizer is None else replace(backend, tokenizer=tokenizer)


def _encode_all(
    backend: Backend, prompts: Sequence[_Encodable], max_tokens: int | None
) -> list[tuple[int, ...]]:
    return [_encode(backend, prompt, max_tokens) for prompt in prompts]


def _encode(backend: Backend, prompt: _Encodable, max_tokens: int | None) -> tuple[int, ...]:
    if isinstance(prompt, TokenPrompt):
        return _checked_ids(backend, prompt, max_tokens)
    return _encode_text(backend, prompt, max_tokens).token_ids


def _encode_text(
    backend: Backend, prompt: TextPrompt | ChatPrompt | _RenderedChat, max_tokens: int | None
) -> PromptText:
    try:
        match prompt:
            case TextPrompt():
                text = backend.tokenizer.prompt(
                    prompt.text, add_special_tokens=prompt.add_special_tokens, max_tokens=max_tokens
                )
            case _RenderedChat():
                text = backend.tokenizer.prompt(prompt.text, add_special_tokens=False, max_tokens=max_tokens)
            case ChatPrompt():
                text = backend.tokenizer.chat_prompt(prompt.messages, max_tokens=max_tokens)
    except PromptTooLongError as error:
        raise _named(error, prompt) from None
    if not text.token_ids:
        raise FieldInvalidError(prompt.field, "has no tokens")
    return text


def _encode_ahead(
    backend: Backend, prompt: _Encodable, max_tokens: int | None
) -> tuple[tuple[int, ...], PromptText | None, int]:
    """Tokens of a prompt that is scored behind; where its text is known, that, and how much of it comes again."""
    if isinstance(prompt, TokenPrompt):
        return _checked_ids(backend, prompt, max_tokens), None, 0
    text = _encode_text(backend, prompt, max_tokens)
    return text.token_ids, text, text.length_again


def _continuations(
    backend: Backend,
    ids: tuple[int, ...],
    prompt: PromptText | None,
    continuations: Sequence[TextPrompt | TokenPrompt],
    max_tokens: int | None,
) -> list[Continuation]:
    return [_continuation(backend, ids, prompt, each, max_tokens) for each in continuations]


def _continuation(
    backend: Backend,
    ids: tuple[int, ...],
    prompt: PromptText | None,
    continuation: TextPrompt | TokenPrompt,
    max_tokens: int | None,
) -> Continuation:
    """What is scored behind a prompt; ``prompt`` is None where its text is not known."""
    if isinstance(continuation, TokenPrompt):
        return Continuation(len(ids), _checked_ids(backend, continuation, max_tokens))
    field, text = continuation.field, continuation.text
    try:
        if max_tokens is not None:
            backend.tokenizer.check_length(text, max_tokens)
        if prompt is None:
            found = Continuation(len(ids), backend.tokenizer.followed_by(text))
        else:
            found = prompt.followed_by(text)
    except PromptTooLongError as error:
        raise _named(error, continuation) from None
    except FieldInvalidError as error:
        raise FieldInvalidError(field, error.description) from error
    if max_tokens is not None and len(found.token_ids) > max_tokens:
        raise PromptTooLongError(field, len(found.token_ids), max_tokens)
    return found


def _checked_ids(backend: Backend, prompt: TokenPrompt, max_tokens: int | None) -> tuple[int, ...]:
    if max_tokens is not None and len(prompt.ids) > max_tokens:
        raise _named(PromptTooLongError("ids", len(prompt.ids), max_tokens), prompt)
    ids: list[int] = []
    for part in slices(prompt.ids):
        largest = max(part)
        if largest >= backend.info.vocab_size:
            raise FieldInvalidError(
                f"{prompt.field}.ids", f"has {largest}; token ids are below {backend.info.vocab_size}"
            )
        ids.extend(part)
    return tuple(ids)


def _length(prompt: _Encodable) -> int:
    match prompt:
        case TokenPrompt():
            return len(prompt.ids) // 64  # nothing to tokenize, but each is looked at
        case TextPrompt() | _RenderedChat():
            return len(prompt.text)
        case ChatPrompt():
            roles = sum(len(message.role.encode()) for message in prompt.messages)
            return prompt.num_bytes + roles + _MESSAGE_LENGTH * len(prompt.messages)


def _check_size(field: str, num_bytes: int) -> None:
    if num_bytes > MAX_TEXT_BYTES:
        raise FieldInvalidError(field, f"has {num_bytes} bytes; the limit is {MAX_TEXT_BYTES}")
