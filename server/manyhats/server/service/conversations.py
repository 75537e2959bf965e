"""Conversations from callers: their messages, tools and template arguments, checked before a template sees them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.text.chat_template import ChatMessage, Rendering
from manyhats.server.service.json_text import depth_of
from manyhats.server.service.text_threads import paced

if TYPE_CHECKING:
    from manyhats.server.service.tool_use import ToolUse

MAX_TEXT_BYTES = 1024 * 1024
MAX_CHAT_MESSAGES = 1024
MAX_ROLE_LENGTH = 64
MAX_NAME_LENGTH = 128
MAX_TOOLS = 128
MAX_CALLS = 1024
MAX_JSON_BYTES = 256 * 1024
MAX_JSON_DEPTH = 32

TEMPLATE_ARGUMENTS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "builtin_tools": (list,),
        "citation_mode": (str,),
        "clear_thinking": (bool,),
        "controls": (dict,),
        "custom_instructions": (str,),
        "date_string": (str,),
        "documents": (list,),
        "enable_thinking": (bool,),
        "keep_past_thinking": (bool,),
        "model_identity": (str,),
        "preserve_thinking": (bool,),
        "python_tools": (list,),
        "reasoning_effort": (str,),
        "safety_mode": (str,),
        "skip_think": (bool,),
        "skip_thinking": (bool,),
        "thinking": (bool,),
        "thinking_budget": (int,),
        "tools_in_user_message": (bool,),
        "xml_tools": (list,),
    }
)
"""What templates of the families in use read besides messages and tools, and its type in JSON."""

T = TypeVar("T")

_JSON_NAMES = {bool: "true or false", str: "a text", int: "a whole number", list: "a list", dict: "an object"}


# What a template writes around each message, in characters.
_MESSAGE_LENGTH = 32
# How long it takes to check a message, and a call of a tool in it, in the weights of ``paced``.
_MESSAGE_WEIGHT = 8
_CALL_WEIGHT = 256


def _plain(turn: Any) -> ChatMessage:
    return ChatMessage(role=turn.role, content=turn.content)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, oldest message first. Making a large one takes a while, in pieces.

    Attributes:
        tools: JSON objects, for templates that read them.
        tool_use: how the answer may call them; None leaves it free, and its text as it is.
        template_arguments: what a template reads besides, by name; see ``TEMPLATE_ARGUMENTS``.
        add_generation_prompt: whether the assistant's next turn begins; None unless the last message is continued.
        continue_final_message: whether the answer continues the last message.
        rendering: what its template gets besides the messages, and how the text ends.
        length: about as many characters as its rendering has.

    Raises:
        FieldInvalidError: a field is out of range; names it as in ``chat.messages[3].role``.
    """

    messages: tuple[ChatMessage, ...]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_use: ToolUse | None = None
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    rendering: Rendering = dataclasses.field(init=False)
    length: int = dataclasses.field(init=False)
    field: ClassVar[str] = "chat.messages"

    @classmethod
    def of(
        cls, turns: Collection[T], read: Callable[[T], ChatMessage] = _plain, **options: Any
    ) -> ChatPrompt:
        """Build one from a transport's messages, once their number is checked.

        Args:
            turns: the messages.
            read: makes each a ``ChatMessage``; by default from its ``role`` and ``content`` alone.
            options: the other fields.

        Raises:
            FieldInvalidError: a field is out of range.
        """
        _check_number(turns)
        return cls(tuple(read(turn) for turn in paced(turns, lambda turn: _MESSAGE_WEIGHT)), **options)

    def __post_init__(self) -> None:
        _check_number(self.messages)
        num_calls = sum(len(each.tool_calls) for each in self.messages)
        if num_calls > MAX_CALLS:
            raise FieldInvalidError(self.field, f"have {num_calls} tool_calls; the limit is {MAX_CALLS}")
        checked = [
            _checked(f"{self.field}[{index}]", each)
            for index, each in enumerate(paced(self.messages, _weight))
        ]
        object.__setattr__(self, "messages", tuple(message for message, _ in checked))
        num_bytes = sum(size for _, size in checked)
        check_size(self.field, num_bytes)
        if self.tool_use is None or self.tool_use.tools is not self.tools:
            besides = check_tools(self.tools)
        else:  # it has checked them
            besides = self.tool_use.num_bytes
        for name, value in self.template_arguments.items():
            _check_argument(name, value)
        besides += _checked_size("chat.template_arguments", self.template_arguments)
        begins = self.add_generation_prompt
        rendering = Rendering(
            variables=dict(self.template_arguments),
            tools=tuple(self.tools),
            add_generation_prompt=not self.continue_final_message if begins is None else begins,
            continue_final_message=self.continue_final_message,
        )
        object.__setattr__(self, "rendering", rendering)
        names = sum(
            len(each.role.encode()) + len(each.name) + len(each.tool_call_id) for each in self.messages
        )
        length = num_bytes + names + besides + _MESSAGE_LENGTH * len(self.messages)
        object.__setattr__(self, "length", length)


def _weight(message: ChatMessage) -> int:
    return _MESSAGE_WEIGHT + _CALL_WEIGHT * len(message.tool_calls)


def _check_number(messages: Collection[Any]) -> None:
    if not 1 <= len(messages) <= MAX_CHAT_MESSAGES:
        raise FieldInvalidError(
            ChatPrompt.field, f"must have 1 to {MAX_CHAT_MESSAGES} messages, not {len(messages)}"
        )


def check_size(name: str, num_bytes: int) -> None:
    """Check the size of a text.

    Raises:
        FieldInvalidError: it is too long.
    """
    if num_bytes > MAX_TEXT_BYTES:
        raise FieldInvalidError(name, f"has {num_bytes} bytes; the limit is {MAX_TEXT_BYTES}")


def check_tools(tools: Sequence[Mapping[str, Any]]) -> int:
    """Check the number of tools, and that they are JSON objects of bounded depth and size; returns their size in bytes.

    Raises:
        FieldInvalidError: they are not.
    """
    if len(tools) > MAX_TOOLS:
        raise FieldInvalidError("chat.tools", f"has {len(tools)}; the limit is {MAX_TOOLS}")
    total = 0
    for index, tool in enumerate(paced(tools, lambda tool: _CALL_WEIGHT)):
        _check_object(f"chat.tools[{index}]", tool)
        total += _checked_size("chat.tools", tool, before=total)
    return total


def json_object(name: str, text: str) -> dict[str, Any]:
    """A JSON object in a text, such as a tool, or the arguments of a call.

    Raises:
        FieldInvalidError: it is too long, or not one.
    """
    if len(text) > MAX_JSON_BYTES:
        raise FieldInvalidError(name, f"has {len(text)} characters; the limit is {MAX_JSON_BYTES}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldInvalidError(name, "is not JSON") from error
    if not isinstance(value, dict):
        raise FieldInvalidError(name, "is not a JSON object")
    return value


def _checked(name: str, message: ChatMessage) -> tuple[ChatMessage, int]:
    """A message as templates read it, its calls' arguments as objects rather than texts, and its bytes."""
    if not 1 <= len(message.role) <= MAX_ROLE_LENGTH:
        raise FieldInvalidError(f"{name}.role", f"must have 1 to {MAX_ROLE_LENGTH} characters")
    for part in ("name", "tool_call_id"):
        if len(getattr(message, part)) > MAX_NAME_LENGTH:
            raise FieldInvalidError(f"{name}.{part}", f"must have at most {MAX_NAME_LENGTH} characters")
    if message.content is None and not message.tool_calls:
        raise FieldInvalidError(f"{name}.content", "must be given where there are no tool_calls")
    num_bytes = len((message.content or "").encode())
    if not message.tool_calls:
        return message, num_bytes
    if message.role != "assistant":
        raise FieldInvalidError(f"{name}.tool_calls", "belong to the assistant's messages only")
    if len(message.tool_calls) > MAX_TOOLS:
        raise FieldInvalidError(
            f"{name}.tool_calls", f"has {len(message.tool_calls)}; the limit is {MAX_TOOLS}"
        )
    calls = [_call(f"{name}.tool_calls[{index}]", call) for index, call in enumerate(message.tool_calls)]
    num_bytes += sum(size for _, size in calls)
    return replace(message, tool_calls=tuple(call for call, _ in calls)), num_bytes


def _call(name: str, call: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A call whose arguments are an object, which OpenAI's API has as text, and its bytes."""
    _check_object(name, call)
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise FieldInvalidError(f"{name}.function", "must be an object with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = json_object(f"{name}.function.arguments", arguments) if arguments.strip() else {}
    elif arguments is None:
        arguments = {}
    _check_object(f"{name}.function.arguments", arguments)
    normal = {"type": "function", **call, "function": {**function, "arguments": arguments}}
    return normal, _checked_size(name, normal)


def _check_argument(name: str, value: Any) -> None:
    path = f"chat.template_arguments.{name}"
    kinds = TEMPLATE_ARGUMENTS.get(name)
    if kinds is None:
        raise FieldInvalidError(path, f"cannot be set; these can: {', '.join(TEMPLATE_ARGUMENTS)}")
    if type(value) not in kinds:
        raise FieldInvalidError(path, f"must be {_JSON_NAMES[kinds[0]]}")


def _check_object(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise FieldInvalidError(name, "must be an object")


def _checked_size(name: str, value: Any, before: int = 0) -> int:
    """The bytes of a value as JSON; 0 of nothing.

    By its text, since a walk in Python would hold up others.

    Args:
        name: of the field.
        value: what is checked.
        before: bytes that belong to the same field.

    Raises:
        FieldInvalidError: it is not JSON, or nested too deeply, or too large.
    """
    if not value:
        return 0
    try:
        text = _json(value)
    except RecursionError:
        raise FieldInvalidError(name, f"is nested deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError:
        raise FieldInvalidError(name, "has a number that is not finite") from None
    except TypeError as error:
        raise FieldInvalidError(name, f"is not JSON: {error}") from None
    num_bytes = before + len(text)
    if num_bytes > MAX_JSON_BYTES:
        raise FieldInvalidError(name, f"has {num_bytes} bytes as JSON; the limit is {MAX_JSON_BYTES}")
    if depth_of(text) >= MAX_JSON_DEPTH:
        raise FieldInvalidError(name, f"is nested deeper than {MAX_JSON_DEPTH} levels")
    return len(text)


def _json(value: Any) -> bytes:
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def _plain_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"it has a {type(value).__name__}")
    return dict(value)


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, default=_plain_mapping)
