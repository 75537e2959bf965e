"""Chat messages to prompt text, by a model's or a task's Jinja template, as transformers renders them.

Templates are other people's programs: they run in Jinja's immutable sandbox, and see only strings and JSON's values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from manyhats.engine.errors import FieldInvalidError, clipped
from manyhats.engine.text.fitted_messages import fitted_to

_MAX_PROBLEM_BYTES = 512  # a refusal is sent in headers
# What the last message is marked with to find its end in the rendering; the space shows whether the template trims it.
_END_OF_FINAL = "\u2039the final message is continued here\u203a "


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation.

    Attributes:
        role: one that the template knows, such as system, user, assistant, tool; ``developer`` is ``system`` to a
            template that does not mention it.
        content: what is said; None where it is only ``tool_calls``.
        name: of the speaker, or of the tool that answers.
        tool_calls: the assistant's, each ``{"type": "function", "function": {"name": …, "arguments": {…}}, …}``.
        tool_call_id: which of them a tool's answer is to.
    """

    role: str
    content: str | None
    name: str = ""
    tool_calls: Sequence[Mapping[str, Any]] = ()
    tool_call_id: str = ""

    def as_read(self) -> dict[str, Any]:
        """What a template sees of it: the fields that it has. Templates tell a missing one from an empty one."""
        shown: dict[str, Any] = {"role": self.role}
        if self.content is not None:
            shown["content"] = self.content
        if self.name:
            shown["name"] = self.name
        if self.tool_calls:
            shown["tool_calls"] = list(self.tool_calls)
        if self.tool_call_id:
            shown["tool_call_id"] = self.tool_call_id
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How a conversation becomes text.

    Attributes:
        variables: what the template may read besides the messages, such as ``enable_thinking``.
        tools: JSON objects, for a template that reads ``tools``; another one refuses them.
        add_generation_prompt: whether to include the beginning of the assistant's next turn.
        continue_final_message: leave the last message open instead: the text ends with it, without what ends a turn.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        if self.add_generation_prompt and self.continue_final_message:
            raise FieldInvalidError(
                "chat.continue_final_message",
                "excludes add_generation_prompt: either the last message is continued, or a new one begins",
            )


_AS_PROMPT = Rendering()


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}``, which marks assistant text for training, renders its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` that accepts no names with a leading underscore, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the underscored name {name!r}")


class _Dictionaries:
    """``dict`` as templates may use it, without the class itself and its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """See ``dict.fromkeys``."""
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which is wrong in a prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dictionaries()
    environment.globals["namespace"] = _Namespace
    return environment


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=64)
def variables_of(template: str) -> frozenset[str]:
    """The names that a template looks up and does not set itself, such as ``messages`` and ``tools``.

    Raises:
        FieldInvalidError: ``chat``: it is not a template.
    """
    environment = _environment()
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))
    except jinja2.TemplateError as error:
        raise FieldInvalidError("chat", f"the chat template cannot be read: {_problem(error)}") from error


def render_chat(
    template: str,
    messages: Sequence[ChatMessage | Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    rendering: Rendering = _AS_PROMPT,
    *,
    now: datetime | None = None,
) -> str:
    """The prompt of a conversation, by default up to where the assistant's next turn begins.

    Args:
        template: Jinja source.
        messages: at least one; a mapping has everything that the template may read.
        special_tokens: ``bos_token`` and so on, by the names templates use.
        rendering: what the template gets besides, and how the text ends.
        now: the date and time it may write; None for the present.

    Raises:
        FieldInvalidError: there are no messages, or the template fails on these, or writes something that is not text;
            ``chat.tools``: it does not read them; ``chat.continue_final_message``: it cannot leave the last one open.
    """
    if not messages:
        raise FieldInvalidError("chat", "has no messages")
    if rendering.tools and "tools" not in variables_of(template):
        raise FieldInvalidError("chat.tools", "the chat template does not read tools")
    turns = fitted_to(template, [each if isinstance(each, Mapping) else each.as_read() for each in messages])
    if not rendering.continue_final_message:
        return _rendered(template, turns, special_tokens, rendering, now)
    content = turns[-1].get("content")
    if not isinstance(content, str):
        raise FieldInvalidError(
            "chat.continue_final_message", "needs a final message with content to be continued"
        )
    marked = [*turns[:-1], {**turns[-1], "content": content + _END_OF_FINAL}]
    return _up_to_mark(_rendered(template, marked, special_tokens, rendering, now), content)


def _up_to_mark(text: str, content: str) -> str:
    """The rendering up to the end of the final message's content.

    A template may trim a message's end; then the text is trimmed there too.
    """
    at = text.rfind(_END_OF_FINAL.strip())
    if at < 0 or content.strip() not in text:
        raise FieldInvalidError(
            "chat.continue_final_message",
            "the chat template changes the final message, so that it cannot be continued",
        )
    return text[:at] if text.startswith(_END_OF_FINAL, at) else text[:at].rstrip()


def _rendered(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    rendering: Rendering,
    now: datetime | None,
) -> str:
    given = {
        "documents": None,
        "add_generation_prompt": rendering.add_generation_prompt,
        "tools": list(rendering.tools) or None,
        **special_tokens,
        **({} if now is None else {"strftime_now": now.strftime}),
        **rendering.variables,
    }
    try:
        text = _compile(template).render(given, messages=messages)
    except Exception as error:  # a template is a program, which can raise anything
        raise FieldInvalidError(
            "chat", f"the chat template refused the messages: {_problem(error)}"
        ) from error
    _check_characters(text)
    return text


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise FieldInvalidError(
            "chat", f"the chat template writes {half}, half of a surrogate pair, which is not a character"
        ) from None


def _problem(error: Exception) -> str:
    return clipped(str(error) or type(error).__name__, _MAX_PROBLEM_BYTES)


def check_template(template: str) -> None:
    """Check that a template compiles.

    Raises:
        ValueError: it does not; says why.
    """
    try:
        _compile(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"line {error.lineno}: {clipped(error.message or '', _MAX_PROBLEM_BYTES)}"
        ) from error
    except Exception as error:  # the compiler's own limits, such as the depth of nesting
        raise ValueError(_problem(error)) from error
