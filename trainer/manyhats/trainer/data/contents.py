"""What a row says: a prompt and its completion, a text, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from manyhats.trainer.data.json_files import json_of_cell
from manyhats.trainer.data.row import FIELDS, KWARGS, LISTS, Row
from manyhats.trainer.settings.settings import DataSettings

Message = Mapping[str, object]
"""A message as the chat template reads it: role, content, and whatever else it has."""


@dataclass(frozen=True, slots=True)
class Prompted:
    """A prompt, and what the model should answer; ``system`` may be empty."""

    prompt: str
    completion: str
    system: str
    variables: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text, learned from its beginning to its end."""

    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages up to the last one that is learned.

    Attributes:
        messages: at least two.
        learned: indices of the assistant's turns that are learned, ascending; at least one, never the first message.
        variables: what else the template reads, such as ``tools``.
    """

    messages: tuple[Message, ...]
    learned: tuple[int, ...]
    variables: Mapping[str, object]


Contents = Prompted | PlainText | Conversation


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How a prompt is made of one text.

    Attributes:
        is_chat: the text is a user's message; otherwise it is the prompt.
        system: the message before it; empty for none.
    """

    is_chat: bool
    system: str = ""


def form_of(contents: Contents, *, is_chat: bool) -> PromptForm | None:
    """How a row's prompt is made of one text; None if it is made of more than that."""
    match contents:
        case Prompted(system=system, variables=variables) if not variables:
            return PromptForm(is_chat, system)
        case Conversation(messages=(*before, _), variables=variables) if not variables:
            return _form_of_messages(before)
    return None


def _form_of_messages(messages: Sequence[Message]) -> PromptForm | None:
    """The form of a user's message, perhaps after a system message; None for anything else."""
    texts = [each.get("content") for each in messages]
    is_plain = all(each.keys() <= {"role", "content"} for each in messages)
    if not is_plain or not all(isinstance(text, str) for text in texts):
        return None
    match [each["role"] for each in messages]:
        case ["user"]:
            return PromptForm(is_chat=True)
        case ["system", "user"]:
            return PromptForm(is_chat=True, system=str(texts[0]))
    return None


def contents_of(row: Row, system: str) -> Contents:
    """What the row says; fields not among ``FIELDS`` are left to the caller.

    It must have exactly one complete kind: ``prompt`` with ``completion``, ``text``, or ``messages``. ``system``, and
    whatever else a chat template reads, may accompany a prompt or messages.

    Args:
        row: as it was read.
        system: the system message if a prompt or a conversation has none; empty for none.

    Raises:
        DataError: it has none or several, or a value has the wrong type.
    """
    fields = {name: value for name, value in row.fields.items() if value is not None}
    kinds = [kind for kind in _KINDS if all(name in fields for name in kind)]
    if len(kinds) > 1:
        raise row.error(f"has {' and '.join('+'.join(kind) for kind in kinds)}: which one is meant?")
    if not kinds:
        raise row.error(_what_lacks(fields))
    variables = _variables(row, fields)
    match kinds[0]:
        case ("text",):
            if variables:
                raise row.error(f"{next(iter(variables))}: does not apply to a text")
            return PlainText(checked_text(row, "text", fields["text"]))
        case ("messages",):
            return _conversation(row, fields, variables, system)
        case _:
            return Prompted(
                prompt=checked_text(row, "prompt", fields["prompt"]),
                completion=checked_text(row, "completion", fields["completion"]),
                system=_system(row, fields) or system,
                variables=variables,
            )


def checked_contents(row: Row, settings: DataSettings) -> Contents:
    """What the row says, if it can be trained on, as far as can be told without a tokenizer.

    Raises:
        DataError: as ``contents_of``; or it has a field that nothing reads, or that its kind does not have.
    """
    contents = contents_of(row, settings.system)
    refuse_unread(row, unknown_fields(row), "nothing reads it", settings)
    match contents:
        case Prompted() if not settings.chat and contents.system:
            raise row.error("system: does not apply to a plain-text prompt; set `chat`")
        case Prompted() if not settings.chat and contents.variables:
            raise row.error(
                f"{next(iter(contents.variables))}: does not apply to a plain-text prompt; set `chat`"
            )
        case PlainText() if row.fields.get("system") or settings.system:
            raise row.error("system: does not apply to a text")
        case _:
            return contents


def refuse_unread(row: Row, names: Sequence[str], why: str, settings: DataSettings) -> None:
    """Refuse fields that are not read, unless the settings ignore them.

    Raises:
        DataError: names the first one.
    """
    if names and not settings.ignore_fields:
        raise row.error(f"{names[0]}: {why}; remove it, or set `ignore_fields` to go on without it")


_KINDS = (("prompt", "completion"), ("text",), ("messages",))
_SET_BY_US = frozenset({"messages", "add_generation_prompt", "strftime_now", *LISTS})
_MARKS = ("weight", "train", "training", "trainable", "loss")
"""Keys of a message that say, in various formats, whether it is learned."""


def _what_lacks(fields: Mapping[str, object]) -> str:
    if "prompt" in fields or "completion" in fields:
        there, lacking = ("prompt", "completion") if "prompt" in fields else ("completion", "prompt")
        return f"has a {there} but no {lacking}"
    found = f"has {', '.join(fields)}" if fields else "has no value"
    return f"{found}; it must have prompt and completion, or text, or messages"


def checked_text(row: Row, name: str, value: object) -> str:
    """A field's value as a text that is not empty.

    Raises:
        DataError: it is none; names the field.
    """
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
    return value if value == "" else checked_text(row, "system", value)


def _variables(row: Row, fields: Mapping[str, object]) -> dict[str, object]:
    """What the template reads besides messages, by the names it has there."""
    variables: dict[str, object] = {}
    for name in LISTS:
        items = checked_list(row, name, fields[name]) if name in fields else []
        if items:
            variables[name] = items
    if KWARGS in fields:
        given = _value(row, KWARGS, fields[KWARGS])
        if not isinstance(given, dict):
            raise row.error(f"{KWARGS}: must be an object, not {type(given).__name__}")
        for name, value in given.items():
            if name in _SET_BY_US:
                raise row.error(f"{KWARGS}.{name}: cannot be set here")
            if value is not None:
                variables[name] = value
    return variables


def _value(row: Row, name: str, value: object) -> object:
    """A list or an object as it is; CSV has it as JSON in a cell."""
    if not isinstance(value, str):
        return value
    try:
        return json_of_cell(value)
    except ValueError as error:
        raise row.error(f"{name}: must be a list, or JSON of one: {error}") from error


def checked_list(row: Row, name: str, value: object) -> list[object]:
    """A field's value as a list; in a table it may be JSON.

    Raises:
        DataError: it is none; names the field.
    """
    value = _value(row, name, value)
    if not isinstance(value, list):
        raise row.error(f"{name}: must be a list, not {type(value).__name__}")
    return value


def _conversation(
    row: Row, fields: Mapping[str, object], variables: Mapping[str, object], otherwise: str
) -> Conversation:
    """The messages up to the last one that is learned; what follows it teaches nothing.

    Args:
        default: the system message if there is none.
    """
    read = [
        _message(row, index, each)
        for index, each in enumerate(checked_list(row, "messages", fields["messages"]))
    ]
    messages = [message for message, _ in read]
    learned = [index for index, (_, is_learned) in enumerate(read) if is_learned]
    system = _system(row, fields)
    has_system = bool(messages) and messages[0]["role"] == "system"
    if system and has_system:
        raise row.error("system: messages begin with a system message too")
    if not learned:
        has_turns = any(message["role"] == "assistant" for message in messages)
        which = "every turn of the assistant is left out" if has_turns else "none is the assistant's"
        raise row.error(f"messages: {which}, so there is nothing to learn")
    if learned[0] == 0:
        raise row.error("messages[0]: is the assistant's; a message must come before it")
    ahead = "" if has_system else system or otherwise
    if ahead:
        messages.insert(0, {"role": "system", "content": ahead})
        learned = [index + 1 for index in learned]
    return Conversation(tuple(messages[: learned[-1] + 1]), tuple(learned), variables)


def _message(row: Row, index: int, value: object) -> tuple[Message, bool]:
    """A message as the template reads it, and whether it is learned."""
    name = f"messages[{index}]"
    if not isinstance(value, dict):
        raise row.error(f"{name}: must be an object with role and content, not {type(value).__name__}")
    if value.get("role") is None:
        raise row.error(f"{name}: has no role")
    role = checked_text(row, f"{name}.role", value["role"])
    is_learned = _is_learned(row, name, role, value)
    # A Parquet file has every key in every message; a null means that it is absent.
    message = {
        key: each
        for key, each in value.items()
        if key not in _MARKS and (each is not None or key == "content")
    }
    says_more = any(
        each not in ("", [], {}) for key, each in message.items() if key not in ("role", "content")
    )
    content = message.get("content")
    if content is None and not says_more:
        raise row.error(f"{name}: has no content")
    if content is not None and (content != "" or (is_learned and not says_more)):
        checked_text(row, f"{name}.content", content)
    return message, is_learned


def _is_learned(row: Row, name: str, role: str, message: Mapping[str, object]) -> bool:
    """Whether the message is to be learned: the assistant's are, unless marked otherwise."""
    said: dict[str, bool] = {}
    for mark in _MARKS:
        value = message.get(mark)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise row.error(f"{name}.{mark}: must be 0 or 1, false or true, not {value!r}")
        said[mark] = bool(value)
    if len(set(said.values())) > 1:
        raise row.error(f"{name}: {' and '.join(said)} contradict each other")
    if role != "assistant" and True in said.values():
        raise row.error(f"{name}.{next(iter(said))}: only turns of the assistant can be learned")
    return role == "assistant" and False not in said.values()


def unknown_fields(row: Row) -> list[str]:
    """The row's fields that nothing reads and that are not empty."""
    return [name for name, value in row.fields.items() if name not in FIELDS and value is not None]
