"""The token that ends an answer, if a model has several, and ends that a text already has."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from manyhats.engine.errors import FieldInvalidError, ModelError
from manyhats.engine.text.chat_template import Rendering
from manyhats.engine.text.tokenizer import ChatMessage, Tokenizer

_QUESTION = ChatMessage("user", "Hello")
_SAID = "World"
_ANSWER = ChatMessage("assistant", _SAID)
PROBES: Sequence[tuple[Sequence[ChatMessage], Rendering]] = (
    ((_QUESTION, _ANSWER), Rendering(add_generation_prompt=False)),
    ((_QUESTION, _ANSWER, _QUESTION), Rendering()),
)
"""Conversations whose text tells what a chat template writes after an assistant's turn, the last and an earlier one."""


@dataclass(frozen=True)
class Ends:
    """How completions end.

    Attributes:
        token_id: the token that completions are taught to end with.
        literals: text of every token that ends a generation → its id.
        of_turn: what the chat template writes after an assistant's turn, which may not be one of those; empty if
            unknown.
    """

    token_id: int
    literals: Mapping[str, int]
    of_turn: str = ""

    def split(self, text: str) -> tuple[str, int | None]:
        """A text without any ends that it already has, and the first one's id; None if it has none.

        White space after an end is removed with it.
        """
        return _split(self._of_text, self.literals, text)

    def split_turn(self, text: str) -> tuple[str, int | None]:
        """The same for an assistant's message, which may end as the template ends a turn."""
        return _split(self._of_message, {self.of_turn.strip(): self.token_id, **self.literals}, text)

    @cached_property
    def _of_text(self) -> re.Pattern[str] | None:
        return _ends_pattern(self.literals)

    @cached_property
    def _of_message(self) -> re.Pattern[str] | None:
        return _ends_pattern([*self.literals, self.of_turn.strip()])


def _ends_pattern(literals: Collection[str]) -> re.Pattern[str] | None:
    """One or more ends at a text's end, with white space between and after them."""
    any_of = "|".join(re.escape(each) for each in sorted(literals, key=len, reverse=True) if each)
    return re.compile(rf"({any_of})(?:\s*(?:{any_of}))*\s*\Z") if any_of else None


def _split(pattern: re.Pattern[str] | None, literals: Mapping[str, int], text: str) -> tuple[str, int | None]:
    found = None if pattern is None else pattern.search(text)
    return (text, None) if found is None else (text[: found.start()], literals[found[1]])


def find_ends(
    tokenizer: Tokenizer, eos_token_ids: Collection[int], rendered: Sequence[str] | None = None
) -> Ends:
    """How completions end with this tokenizer.

    Args:
        eos_token_ids: as ``GenerationDefaults`` has them.
        rendered: ``PROBES`` by the chat template, empty if it cannot; None renders them here.

    Raises:
        ModelError: there are no ids: a generation would never end.
    """
    literals = {tokenizer.piece(token_id): token_id for token_id in sorted(eos_token_ids)}
    texts = _rendered(tokenizer) if rendered is None else rendered
    last, earlier = (text.rpartition(_SAID)[2] for text in texts or ("", ""))
    return Ends(
        token_id=_taught_end(tokenizer, eos_token_ids, earlier),
        literals={
            literal: token_id
            for literal, token_id in literals.items()
            if tokenizer.encode(literal, add_special_tokens=False) == [token_id]
        },
        of_turn=_common_beginning(last, earlier),
    )


def _taught_end(tokenizer: Tokenizer, eos_token_ids: Collection[int], behind_a_turn: str) -> int:
    """Which of the tokens that end a generation a completion is taught to end with.

    The one that the chat template writes after an assistant's turn, such as Gemma's ``<end_of_turn>``; else the
    tokenizer's ``eos_token``; else the smallest.
    """
    if not eos_token_ids:
        raise ModelError("the base names no token that ends a generation (eos_token_id)")
    of_turn = tokenizer.encode(behind_a_turn.lstrip(), add_special_tokens=False)
    for candidate in (*of_turn[:1], tokenizer.special_token_id("eos_token")):
        if candidate is not None and candidate in eos_token_ids:
            return candidate
    return min(eos_token_ids)


def _rendered(tokenizer: Tokenizer) -> Sequence[str]:
    """``PROBES`` as text; none if there is no template, or it refuses them."""
    if tokenizer.chat_template is None:
        return ()
    try:
        return [tokenizer.render_chat(messages, rendering=rendering) for messages, rendering in PROBES]
    except FieldInvalidError:
        return ()


def _common_beginning(first: str, second: str) -> str:
    while not second.startswith(first):
        first = first[:-1]
    return first
