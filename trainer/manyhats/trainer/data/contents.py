"""What a row says: a prompt and its completion, a text, or a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from manyhats.engine.tokenizer import ChatMessage
from manyhats.trainer.data.row import Row


@dataclass(frozen=True, slots=True)
class Prompted:
    """A prompt, and what the model is to say to it; ``system`` may be empty."""

    prompt: str
    completion: str
    system: str


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text, learned from its beginning to its end."""

    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, of which the assistant's are learned; at least one is, and none before another's message."""

    messages: tuple[ChatMessage, ...]


Contents = Prompted | PlainText | Conversation


def contents_of(row: Row) -> Contents:
    """What the row says.

    Of the kinds it must have exactly one whole: ``prompt`` with ``completion``, ``text``, or ``messages``.
    ``system`` may stand beside a prompt or messages.

    Raises:
        DataError: it has none, or several, or a value is of a wrong type.
    """
    fields = {name: value for name, value in row.fields.items() if value is not None}
    kinds = [kind for kind in _KINDS if all(name in fields for name in kind)]
    if len(kinds) > 1:
        raise row.error(f"has {' and '.join('+'.join(kind) for kind in kinds)}: which one is meant?")
    if not kinds:
        raise row.error(_what_lacks(fields))
    match kinds[0]:
        case ("text",):
            return PlainText(_string(row, "text", fields["text"]))
        case ("messages",):
            return Conversation(_conversation(row, fields))
        case _:
            return Prompted(
                prompt=_string(row, "prompt", fields["prompt"]),
                completion=_string(row, "completion", fields["completion"]),
                system=_system(row, fields),
            )


_KINDS = (("prompt", "completion"), ("text",), ("messages",))


def _what_lacks(fields: Mapping[str, object]) -> str:
    if "prompt" in fields or "completion" in fields:
        there, lacking = ("prompt", "completion") if "prompt" in fields else ("completion", "prompt")
        return f"has a {there} and no {lacking}"
    found = f"has {', '.join(fields)}" if fields else "has no value"
    return f"{found}; it must have prompt and completion, or text, or messages"


def _string(row: Row, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise row.error(f"{name}: must be a string, not {type(value).__name__}")
    if not value:
        raise row.error(f"{name}: is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise row.error(f"{name}: has half a surrogate pair at character {error.start + 1}") from error
    return value


def _system(row: Row, fields: Mapping[str, object]) -> str:
    value = fields.get("system", "")
    return value if value == "" else _string(row, "system", value)


def _conversation(row: Row, fields: Mapping[str, object]) -> tuple[ChatMessage, ...]:
    """The messages up to the assistant's last one; what follows it teaches nothing."""
    messages = [_message(row, index, each) for index, each in enumerate(_items(row, fields["messages"]))]
    system = _system(row, fields)
    if system and messages and messages[0].role == "system":
        raise row.error("system: messages begin with a system message too")
    if system:
        messages.insert(0, ChatMessage("system", system))
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        raise row.error("messages: none is the assistant's, so there is nothing to learn")
    if turns[0] == 0:
        raise row.error("messages[0]: is the assistant's; a message must come before it")
    return tuple(messages[: turns[-1] + 1])


def _items(row: Row, value: object) -> list[object]:
    """The messages as a list; CSV has it as JSON in a cell."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise row.error(f"messages: must be a list, or JSON of one: {error}") from error
        except ValueError as error:
            raise row.error("messages: has a number of too many digits") from error
        except RecursionError as error:
            raise row.error("messages: is nested too deeply") from error
    if not isinstance(value, list):
        raise row.error(f"messages: must be a list, not {type(value).__name__}")
    return value


def _message(row: Row, index: int, value: object) -> ChatMessage:
    name = f"messages[{index}]"
    if not isinstance(value, dict):
        raise row.error(f"{name}: must be an object with role and content, not {type(value).__name__}")
    for key in ("role", "content"):
        if value.get(key) is None:
            raise row.error(f"{name}: has no {key}")
    for key in ("tool_calls", "function_call"):
        if value.get(key):
            raise row.error(f"{name}: has {key}; only role and content can be learned")
    role = _string(row, f"{name}.role", value["role"])
    content = value["content"]
    if role == "assistant" or content != "":
        content = _string(row, f"{name}.content", content)
    return ChatMessage(role, content)
