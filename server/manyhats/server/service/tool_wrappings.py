"""How the families of models write calls of tools in their answers; a family is a row of ``WRAPPINGS``.

Templates do not say it in a form that could be read, but they show calls to the model, in earlier answers or in their
instructions: a row is recognised by that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from manyhats.engine.errors import FieldInvalidError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapping:
    """The text around calls: opening, before, then calls with separators between them, closing.

    Each call is head, the function's name, middle, its arguments as a JSON object, tail.

    Attributes:
        family: its name.
        marks: texts that a template of this family has, all of them.
        foreign: texts that none of its templates has, since they belong to another family.
        opening: what begins the calls, wherever in the answer; "" if nothing does, and a call is the whole answer.
        before: what stands between the opening and the first call, besides a space.
        separator: between calls; None if a family makes only one.
        tokens: the parts that may be tokens of their own. Where a tokenizer has them, only they count, not their text.
    """

    family: str
    marks: tuple[str, ...]
    foreign: tuple[str, ...] = ()
    opening: str = ""
    before: str = ""
    head: str
    middle: str
    tail: str
    separator: str | None = None
    closing: str = ""
    tokens: tuple[str, ...] = ()


WRAPPINGS = (
    Wrapping(
        family="Hermes and Qwen",
        marks=("<tool_call>", '"name": ', '"arguments": '),
        foreign=("<function=", "<arg_key>", "<|tool_call"),
        opening="<tool_call>",
        head='\n{"name": "',
        middle='", "arguments": ',
        tail="}\n</tool_call>",
        separator="\n<tool_call>",
        tokens=("<tool_call>", "</tool_call>"),
    ),
    Wrapping(
        family="Mistral",
        marks=("[TOOL_CALLS]",),
        foreign=("[ARGS]", "[CALL_ID]"),
        opening="[TOOL_CALLS]",
        before="[",
        head='{"name": "',
        middle='", "arguments": ',
        tail="}",
        separator=", ",
        closing="]",
        tokens=("[TOOL_CALLS]",),
    ),
    Wrapping(
        family="Mistral, from version 11 of its tokenizer on",
        marks=("[TOOL_CALLS]", "[ARGS]"),
        foreign=("[CALL_ID]",),
        opening="[TOOL_CALLS]",
        head="",
        middle="[ARGS]",
        tail="",
        separator="[TOOL_CALLS]",
        tokens=("[TOOL_CALLS]", "[ARGS]"),
    ),
    Wrapping(
        family="Llama 3",
        marks=('{"name": ', '"parameters": '),
        foreign=(
            "<tool_call",
            "<|tool",
            "[TOOL_CALLS]",
            "<function",
            "functools",
            "tool_name",
            "tool\u2581call",
        ),
        head='{"name": "',
        middle='", "parameters": ',
        tail="}",
    ),
)


@lru_cache(maxsize=64)
def wrapping_of(template: str) -> Wrapping:
    """The wrapping that a chat template teaches its model.

    Raises:
        FieldInvalidError: ``chat.tools``: it is none of ``WRAPPINGS``.
    """
    # Quotes may be escaped, once in Jinja and once more in a text that itself shows JSON.
    text = template.replace("\\", "")
    for each in WRAPPINGS:
        if all(mark in text for mark in each.marks) and not any(mark in text for mark in each.foreign):
            return each
    raise FieldInvalidError(
        "chat.tools",
        "the chat template has calls written in a form that is not known here; known are those of "
        f"{'; '.join(each.family for each in WRAPPINGS)}. With tool_choice none, tools are only shown to the model",
    )
