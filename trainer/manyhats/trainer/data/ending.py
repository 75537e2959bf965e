"""The token that ends a completion, where a model has several."""

from __future__ import annotations

from collections.abc import Collection

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.tokenizer import ChatMessage, Tokenizer
from manyhats.trainer.errors import BaseError

_QUESTION = ChatMessage("user", "Hello")
_ANSWER = ChatMessage("assistant", "World")


def choose_eos_token_id(tokenizer: Tokenizer, eos_token_ids: Collection[int]) -> int:
    """Which of the tokens that end a generation a completion is taught to end with.

    The one that the chat template writes after an assistant's turn, such as Gemma's ``<end_of_turn>``; else the
    tokenizer's ``eos_token``; else the smallest.

    Args:
        eos_token_ids: as ``GenerationDefaults`` has them.

    Raises:
        BaseError: there is none: a generation would never end.
    """
    if not eos_token_ids:
        raise BaseError("the base names no token that ends a generation (eos_token_id)")
    for candidate in (_end_of_turn(tokenizer), tokenizer.special_token_id("eos_token")):
        if candidate is not None and candidate in eos_token_ids:
            return candidate
    return min(eos_token_ids)


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The token after an assistant's turn in a conversation that goes on; None where that cannot be told."""
    if tokenizer.chat_template is None:
        return None
    try:
        before = tokenizer.encode_chat([_QUESTION])
        whole = tokenizer.encode_chat([_QUESTION, _ANSWER, _QUESTION])
    except FieldInvalidError:
        return None
    before += tokenizer.encode(_ANSWER.content, add_special_tokens=False)
    return whole[len(before)] if whole[: len(before)] == before and len(whole) > len(before) else None
