"""Which tools an answer may call, and the language that keeps its calls valid."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import FieldInvalidError
from manyhats.server.service.conversations import MAX_TOOLS, check_tools
from manyhats.server.service.tool_wrappings import Wrapping, wrapping_of

if TYPE_CHECKING:
    from manyhats.engine.text.tokenizer import Tokenizer

ToolChoice = Literal["none", "auto", "required"]

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_PARAMETERS: Mapping[str, Any] = {"properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class _Function:
    """A tool: its name, the JSON schema of its arguments, which are an object, and where it stands in the request."""

    name: str
    parameters: Mapping[str, Any]
    field: str

    @property
    def schema(self) -> str:
        """The schema's text."""
        return json.dumps({"type": "object", **self.parameters}, default=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """How an answer may use its conversation's tools.

    Attributes:
        tools: functions, as OpenAI's API has them: ``{"type": "function", "function": {"name": …, "parameters": …}}``.
            Parameters are a JSON schema with the bounds of such a constraint; without any a function has no arguments.
        choice: whether the answer must be calls, may make some after its text, or is text, whatever it looks like.
        only: the function that a required call must be of; None for any.
        is_parallel: whether there may be several calls.
        num_bytes: of the tools as JSON.

    Raises:
        FieldInvalidError: ``chat.tools`` or a part of it, or ``chat.tool_choice``.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    choice: ToolChoice = "none"
    only: str | None = None
    is_parallel: bool = True
    functions: tuple[_Function, ...] = field(init=False)
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_bytes", check_tools(self.tools))
        functions = [_function(f"chat.tools[{index}]", tool) for index, tool in enumerate(self.tools)]
        names = [each.name for each in functions]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise FieldInvalidError(
                    f"chat.tools[{index}].function.name", f"{name!r} is that of another one too"
                )
        if self.choice == "required" and not names:
            raise FieldInvalidError("chat.tool_choice", "requires a call, but there are no tools")
        if self.only is not None and self.only not in names:
            raise FieldInvalidError(
                "chat.tool_choice", f"requires {self.only[:64]!r}, which is not among the tools"
            )
        called = [each for each in functions if self.only in (None, each.name)]
        object.__setattr__(self, "functions", tuple(called))

    @property
    def may_call(self) -> bool:
        """Whether the answer may make calls."""
        return bool(self.functions) and self.choice != "none"

    def constraint(self, tokenizer: Tokenizer, eos_token_ids: Collection[int]) -> Constraint:
        """The language of the answer: calls as the tokenizer's chat template has them, maybe after free text.

        Raises:
            FieldInvalidError: ``chat.tools``: the template's wrapping is not known; or a function's parameters are over
                a bound.
        """
        grammar = _Grammar(wrapping_of(tokenizer.chat_template or ""), tokenizer, self.is_parallel)
        rules = grammar.rules(
            [each.name for each in self.functions],
            must_call=self.choice == "required",
            eos_token_ids=eos_token_ids,
        )
        try:
            return Constraint("tools", ("\n".join(rules), *(each.schema for each in self.functions)))
        except FieldInvalidError as error:
            fields = {f"tools[{index}]": each.field for index, each in enumerate(self.functions)}
            raise FieldInvalidError(fields.get(error.field, "chat.tools"), error.description) from None


def _function(name: str, tool: Mapping[str, Any]) -> _Function:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise FieldInvalidError(name, "must be of type function, and have one")
    given = function.get("name")
    if not isinstance(given, str) or not _NAME.fullmatch(given):
        raise FieldInvalidError(
            f"{name}.function.name", "must have 1 to 64 letters of a to z and A to Z, digits, _ and -"
        )
    parameters = function.get("parameters")
    path = f"{name}.function.parameters"
    if parameters is None:
        parameters = _NO_PARAMETERS
    elif not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise FieldInvalidError(path, "must be the JSON schema of an object")
    return _Function(given, parameters, path)


@dataclass(frozen=True, slots=True)
class _Grammar:
    """A wrapping's calls as rules in Lark's notation, in which ``@schema_0`` is the first function's schema."""

    wrapping: Wrapping
    tokenizer: Tokenizer
    is_parallel: bool

    def rules(
        self, names: Sequence[str], *, must_call: bool, eos_token_ids: Collection[int]
    ) -> Iterator[str]:
        """The rules, from ``start`` on."""
        wrapping = self.wrapping
        opening_id = self.token_id(wrapping.opening)
        space = '" "?' if wrapping.before else ""
        separated = f"({self.symbols(wrapping.separator)} call){{0,{MAX_TOOLS - 1}}}"
        more = separated if self.is_parallel and wrapping.separator else ""
        yield f"calls: {space} {self.symbols(wrapping.before)} call {more} {self.symbols(wrapping.closing)}"
        if must_call:
            yield f"start: {self.symbols(wrapping.opening)} calls"
        elif opening_id is not None:
            # Whatever is not the token stays free, parts of characters and other special tokens as well.
            others = ",".join(map(str, sorted({opening_id, *eos_token_ids})))
            yield f"start: <[^{others}]>* (<[{opening_id}]> calls)?"
        else:
            # What is lazy is no free text any more once it is complete.
            yield "TEXT: /(?s:.*)/"
            yield f"start: {'opened' if wrapping.opening else ''} calls | TEXT"
            if wrapping.opening:
                yield f"opened[lazy]: TEXT {_quoted(wrapping.opening)}"
        yield f"call: {' | '.join(f'call_{index}' for index in range(len(names)))}"
        for index, name in enumerate(names):
            head, *rest = self.parts(f"{wrapping.head}{name}{wrapping.middle}")
            yield f"head_{index}{'' if wrapping.opening else '[lazy]'}: {head}"
            yield f"call_{index}: head_{index} {' '.join(rest)} @schema_{index} {self.symbols(wrapping.tail)}"

    def symbols(self, text: str | None) -> str:
        """A text as its parts in a rule."""
        return " ".join(self.parts(text or ""))

    def parts(self, text: str) -> list[str]:
        """A text as texts and tokens."""
        found = re.split(f"({'|'.join(map(re.escape, self.wrapping.tokens)) or '(?!)'})", text)
        ids = [self.token_id(each) for each in found]
        return [
            _quoted(each) if token_id is None else f"<[{token_id}]>"
            for each, token_id in zip(found, ids, strict=True)
            if each
        ]

    def token_id(self, text: str) -> int | None:
        """The id of a part of the wrapping; None if the tokenizer has none for it."""
        return self.tokenizer.token_id(text) if text in self.wrapping.tokens else None


def _quoted(text: str) -> str:
    return json.dumps(text)
