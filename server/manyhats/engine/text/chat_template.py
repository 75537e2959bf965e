"""Chat messages to prompt text, by a model's or a task's Jinja template, as transformers renders them.

Templates are other people's programs: they run in Jinja's immutable sandbox and see only strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

_MAX_PROBLEM_BYTES = 512  # a refusal is sent in headers


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; ``role`` is one that the template knows, such as system, user, assistant."""

    role: str
    content: str


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
    *,
    variables: Mapping[str, Any] | None = None,
    now: datetime | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt of a conversation, up to where the assistant's next turn begins.

    Args:
        template: Jinja source.
        messages: at least one; a mapping has everything that the template may read.
        special_tokens: ``bos_token`` and so on, by the names templates use.
        variables: what the template may read besides, such as ``tools``.
        now: the date and time it may write; None for the present.
        add_generation_prompt: whether to include the beginning of the assistant's turn.

    Raises:
        FieldInvalidError: there are no messages, or the template fails on these, or writes something that is not text.
    """
    if not messages:
        raise FieldInvalidError("chat", "has no messages")
    given = {
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **special_tokens,
        **({} if now is None else {"strftime_now": now.strftime}),
        **(variables or {}),
    }
    try:
        text = _compile(template).render(
            given,
            messages=[
                m if isinstance(m, Mapping) else {"role": m.role, "content": m.content} for m in messages
            ],
        )
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
