"""Prompts as callers give them, their limits, and how they become token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.tokenizer import ChatMessage
from manyhats.server.ports import Backend

T = TypeVar("T")

MAX_TEXT_BYTES = 1024 * 1024
MAX_CHAT_MESSAGES = 1024
MAX_ROLE_LENGTH = 64

# Longer texts are tokenized in a worker thread, so that they do not hold up the streams of others. For
# shorter ones the change of threads would cost more than the tokenizer does.
_INLINE_LENGTH = 2048


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

    ids: tuple[int, ...]
    field: str = "token_ids"

    def __post_init__(self) -> None:
        if not self.ids:
            raise FieldInvalidError(f"{self.field}.ids", "must not be empty")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, oldest message first."""

    messages: tuple[ChatMessage, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.messages) <= MAX_CHAT_MESSAGES:
            raise FieldInvalidError(
                "chat.messages", f"must have 1 to {MAX_CHAT_MESSAGES} messages, not {len(self.messages)}"
            )
        for index, message in enumerate(self.messages):
            if not 1 <= len(message.role) <= MAX_ROLE_LENGTH:
                raise FieldInvalidError(
                    f"chat.messages[{index}].role", f"must have 1 to {MAX_ROLE_LENGTH} characters"
                )
        _check_size("chat.messages", self.num_bytes)

    @property
    def num_bytes(self) -> int:
        """All contents together, in UTF-8."""
        return sum(len(message.content.encode()) for message in self.messages)


Prompt = TextPrompt | TokenPrompt | ChatPrompt


async def encode_prompts(backend: Backend, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Token ids of prompts, in order.

    Raises:
        FieldInvalidError: an id is outside the vocabulary, a prompt has no tokens, or the chat template refused.
    """
    return await _run(partial(_encode_all, backend, prompts), sum(_length(prompt) for prompt in prompts))


async def pieces_of(backend: Backend, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself."""
    return await _run(lambda: [backend.tokenizer.piece(token_id) for token_id in ids], len(ids))


def _encode_all(backend: Backend, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    return [_encode(backend, prompt) for prompt in prompts]


def _encode(backend: Backend, prompt: Prompt) -> tuple[int, ...]:
    match prompt:
        case TokenPrompt():
            ids, field = list(prompt.ids), f"{prompt.field}.ids"
            largest = max(ids)
            if largest >= backend.info.vocab_size:
                raise FieldInvalidError(
                    field, f"has {largest}; token ids are below {backend.info.vocab_size}"
                )
        case TextPrompt():
            ids = backend.tokenizer.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
            field = prompt.field
        case ChatPrompt():
            ids, field = backend.tokenizer.encode_chat(prompt.messages), "chat.messages"
    if not ids:
        raise FieldInvalidError(field, "has no tokens")
    return tuple(ids)


def _length(prompt: Prompt) -> int:
    match prompt:
        case TokenPrompt():
            return 0  # nothing to tokenize
        case TextPrompt():
            return len(prompt.text)
        case ChatPrompt():
            return prompt.num_bytes


async def _run(work: Callable[[], T], length: int) -> T:
    return work() if length <= _INLINE_LENGTH else await asyncio.to_thread(work)


def _check_size(field: str, num_bytes: int) -> None:
    if num_bytes > MAX_TEXT_BYTES:
        raise FieldInvalidError(field, f"has {num_bytes} bytes; the limit is {MAX_TEXT_BYTES}")
