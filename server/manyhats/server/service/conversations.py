"""Conversations from callers: their messages, tools and template arguments, checked before a template sees them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.text.chat_template import ChatMessage, Rendering

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


def _plain(turn: Any) -> ChatMessage:
    return ChatMessage(role=turn.role, content=turn.content)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, oldest message first.

    Attributes:
        tools: JSON objects, for templates that read them.
        tool_use: how the answer may call them; None leaves it free, and its text as it is.
        template_arguments: what a template reads besides, by name; see ``TEMPLATE_ARGUMENTS``.
        add_generation_prompt: whether the assistant's next turn begins; None unless the last message is continued.
        continue_final_message: whether the answer continues the last message.
        rendering: what its template gets besides the messages, and how the text ends.

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
        return cls(tuple(read(turn) for turn in turns), **options)

    def __post_init__(self) -> None:
        _check_number(self.messages)
        num_calls = sum(len(each.tool_calls) for each in self.messages)
        if num_calls > MAX_CALLS:
            raise FieldInvalidError(self.field, f"have {num_calls} tool_calls; the limit is {MAX_CALLS}")
        messages = [_checked(f"{self.field}[{index}]", each) for index, each in enumerate(self.messages)]
        object.__setattr__(self, "messages", tuple(messages))
        check_size(self.field, self.num_bytes)
        if self.tool_use is None or self.tool_use.tools is not self.tools:  # which it has checked
            check_tools(self.tools)
        for name, value in self.template_arguments.items():
            _check_argument(name, value)
        _check_json("chat.template_arguments", self.template_arguments)
        begins = self.add_generation_prompt
        rendering = Rendering(
            variables=dict(self.template_arguments),
            tools=tuple(self.tools),
            add_generation_prompt=not self.continue_final_message if begins is None else begins,
            continue_final_message=self.continue_final_message,
        )
        object.__setattr__(self, "rendering", rendering)

    @property
    def num_bytes(self) -> int:
        """All contents and tool calls together, in UTF-8."""
        return sum(
            len((each.content or "").encode()) + (_size(each.tool_calls) if each.tool_calls else 0)
            for each in self.messages
        )

    @property
    def length(self) -> int:
        """About as many characters as its rendering has."""
        names = sum(
            len(each.role.encode()) + len(each.name) + len(each.tool_call_id) for each in self.messages
        )
        besides = (
            _size([*self.tools, self.template_arguments]) if self.tools or self.template_arguments else 0
        )
        return self.num_bytes + names + besides + _MESSAGE_LENGTH * len(self.messages)


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


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Check the number of tools, and that they are JSON objects of bounded depth and size.

    Raises:
        FieldInvalidError: they are not.
    """
    if len(tools) > MAX_TOOLS:
        raise FieldInvalidError("chat.tools", f"has {len(tools)}; the limit is {MAX_TOOLS}")
    for index, tool in enumerate(tools):
        _check_object(f"chat.tools[{index}]", tool)
    _check_json("chat.tools", tools)


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


def _checked(name: str, message: ChatMessage) -> ChatMessage:
    """A message as templates read it, its calls' arguments as objects rather than texts."""
    if not 1 <= len(message.role) <= MAX_ROLE_LENGTH:
        raise FieldInvalidError(f"{name}.role", f"must have 1 to {MAX_ROLE_LENGTH} characters")
    for part in ("name", "tool_call_id"):
        if len(getattr(message, part)) > MAX_NAME_LENGTH:
            raise FieldInvalidError(f"{name}.{part}", f"must have at most {MAX_NAME_LENGTH} characters")
    if message.content is None and not message.tool_calls:
        raise FieldInvalidError(f"{name}.content", "must be given where there are no tool_calls")
    if not message.tool_calls:
        return message
    if message.role != "assistant":
        raise FieldInvalidError(f"{name}.tool_calls", "belong to the assistant's messages only")
    if len(message.tool_calls) > MAX_TOOLS:
        raise FieldInvalidError(
            f"{name}.tool_calls", f"has {len(message.tool_calls)}; the limit is {MAX_TOOLS}"
        )
    calls = [_call(f"{name}.tool_calls[{index}]", call) for index, call in enumerate(message.tool_calls)]
    return replace(message, tool_calls=tuple(calls))


def _call(name: str, call: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose arguments are an object, which OpenAI's API has as text."""
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
    _check_json(name, normal)
    return normal


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


def _check_json(name: str, value: Any) -> None:
    """Check that a value is JSON of bounded depth and size, by its text: a walk in Python would hold up others."""
    if not value:
        return
    try:
        text = _json(value)
    except RecursionError:
        raise FieldInvalidError(name, f"is nested deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError:
        raise FieldInvalidError(name, "has a number that is not finite") from None
    except TypeError as error:
        raise FieldInvalidError(name, f"is not JSON: {error}") from None
    if len(text) > MAX_JSON_BYTES:
        raise FieldInvalidError(name, f"has {len(text)} bytes as JSON; the limit is {MAX_JSON_BYTES}")
    changes = _BRACKETS.sub(b"", text).translate(_DEPTH_CHANGES)
    if max(accumulate(each - 1 for each in changes), default=0) >= MAX_JSON_DEPTH:
        raise FieldInvalidError(name, f"is nested deeper than {MAX_JSON_DEPTH} levels")


def _size(value: Any) -> int:
    return len(_json(value))


def _json(value: Any) -> bytes:
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def _plain_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"it has a {type(value).__name__}")
    return dict(value)


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, default=_plain_mapping)
# All of JSON but the brackets that are not in texts.
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[^][{}"]+', re.DOTALL)
_DEPTH_CHANGES = bytes.maketrans(b"{[}]", bytes([2, 2, 0, 0]))
