"""Tokenizers and chat templates that write calls of tools as the families do, and random tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from support.factories.json_schemas import json_schemas
from support.factories.tiny_models import tiny_tokenizer

Tool = dict[str, Any]

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

_TURNS = """\
{%- if tools %}<|im_start|>system
INSTRUCTION Functions: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}CALL{% endfor %}
{%- if message.tool_call_id %} (to {{ message.tool_call_id }}){% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def _template(instruction: str, call: str) -> str:
    return _TURNS.replace("INSTRUCTION", instruction).replace("CALL", call)


_NAME, _ARGUMENTS = "{{ call.function.name }}", "{{ call.function.arguments | tojson }}"


def as_token(text: str) -> str:
    """A text as vocabularies of bytes write it."""
    return "".join(part for part, _ in _BYTES.pre_tokenize_str(text))


@dataclass(frozen=True)
class Family:
    """How a family writes calls.

    Attributes:
        template: its chat template.
        tokens: those that its tokenizer has for them.
        are_special: whether these are hidden from texts.
        call: NAME and ARGUMENTS stand for those; calls are between opening and closing, with separators between them.
    """

    template: str
    tokens: tuple[str, ...] = ()
    are_special: bool = False
    opening: str = ""
    call: str = ""
    separator: str | None = None
    closing: str = ""

    def tokenizer(self, *pieces: str) -> Tokenizer:
        """A tiny tokenizer that has its tokens; ``pieces`` are more of them, which no text is split into."""
        content = json.loads(tiny_tokenizer().to_str())
        vocabulary = content["model"]["vocab"]
        for piece in pieces:
            vocabulary.setdefault(as_token(piece), len(vocabulary))
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.add_tokens(
            [AddedToken(each, special=self.are_special, normalized=False) for each in self.tokens]
        )
        return tokenizer

    def calls(self, *calls: tuple[str, str]) -> str:
        """Calls as the family writes them: each a function's name and its arguments."""
        texts = [self.call.replace("NAME", name).replace("ARGUMENTS", text) for name, text in calls]
        assert len(texts) == 1 or self.separator is not None
        return self.opening + (self.separator or "").join(texts) + self.closing


_HERMES = Family(
    _template(
        'Answer with a call, <tool_call>\n{"name": …, "arguments": …}\n</tool_call>, if one helps.',
        f'\n<tool_call>\n{{"name": "{_NAME}", "arguments": {_ARGUMENTS}}}\n</tool_call>',
    ),
    opening="<tool_call>",
    call='\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>',
    separator="\n<tool_call>",
)
_HERMES_TOKENS = ("<tool_call>", "</tool_call>")
FAMILIES: Mapping[str, Family] = {
    "hermes": Family(**{**vars(_HERMES), "tokens": _HERMES_TOKENS}),
    "hermes, special": Family(**{**vars(_HERMES), "tokens": _HERMES_TOKENS, "are_special": True}),
    "hermes, as text": _HERMES,
    "mistral": Family(
        _template(
            "",
            f'{{{{ ("[TOOL_CALLS] [" if loop.first else "") + \'{{"name": "\' }}}}{_NAME}", "arguments": {_ARGUMENTS}}}'
            "{{ ']' if loop.last else ', ' }}",
        ),
        tokens=("[TOOL_CALLS]",),
        are_special=True,
        opening="[TOOL_CALLS] [",
        call='{"name": "NAME", "arguments": ARGUMENTS}',
        separator=", ",
        closing="]",
    ),
    "mistral 11": Family(
        _template("", f"[TOOL_CALLS]{_NAME}[ARGS]{_ARGUMENTS}"),
        tokens=("[TOOL_CALLS]", "[ARGS]"),
        are_special=True,
        opening="[TOOL_CALLS]",
        call="NAME[ARGS]ARGUMENTS",
        separator="[TOOL_CALLS]",
    ),
    "llama": Family(
        _template(
            'Answer with {"name": the name, "parameters": the arguments}, if that helps.',
            f'{{{{ \'{{"name": "\' }}}}{_NAME}", "parameters": {_ARGUMENTS}}}',
        ),
        call='{"name": "NAME", "parameters": ARGUMENTS}',
    ),
}


def tool(name: str, parameters: Any = None) -> Tool:
    """A function, with a JSON schema of its arguments if there is one."""
    function = {"name": name, "description": f"does {name}"}
    return {
        "type": "function",
        "function": function if parameters is None else {**function, "parameters": parameters},
    }


WEATHER = tool(
    "weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 4},
            "days": {"type": "integer", "maximum": 9, "minimum": 0},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
)
CLOCK = tool("clock")


def tools() -> st.SearchStrategy[Sequence[Tool]]:
    """Functions whose arguments have small schemas."""
    names = st.text("abz_-09", min_size=1, max_size=5)
    objects = json_schemas().map(
        lambda schema: {
            "type": "object",
            "properties": {"x": {key: value for key, value in schema.items() if key != "$defs"}},
            "required": ["x"],
            "additionalProperties": False,
            "$defs": schema["$defs"],
        }
    )
    return st.dictionaries(names, st.none() | objects, min_size=1, max_size=4).map(
        lambda found: [tool(name, parameters) for name, parameters in found.items()]
    )
