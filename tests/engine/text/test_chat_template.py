"""Conversations with tools, template arguments and open ends, rendered as transformers renders them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from transformers import AutoTokenizer

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.text.chat_template import ChatMessage, Rendering, render_chat
from manyhats.engine.text.text_process import TextProcesses
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.default_model import default_model_directory
from support.factories.tiny_models import CHAT_TEMPLATE, save_tokenizer
from support.oracles.golden import needs_golden

# In the manner of the families: what they read, trim and refuse.
TEMPLATES: Mapping[str, str] = {
    "tiny": CHAT_TEMPLATE,
    "turns between marks, tools as JSON": """
{%- if tools %}<|start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}<|start|>assistant
{% if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls %}
<call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</call>
{%- endfor %}<|end|>
{% elif not (tools and loop.first and m.role == 'system') %}<|start|>{{ m.role }}
{{ m.content }}<|end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}""",
    "headers, trimmed contents, dates": """{{ bos_token }}
{%- set date = date_string if date_string is defined else '1 Jan' -%}
<|h|>system<|/h|>Today: {{ date }}<|e|>
{%- for m in messages -%}
<|h|>{{ m['role'] }}<|/h|>

{{ m['content'] | trim + '<|e|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|h|>assistant<|/h|>

{% endif -%}""",
    "pairs in brackets, names and call ids": """{{ bos_token }}{% for m in messages -%}
{% if m.role == 'user' %}[I] {{ m.name + ': ' if m.name else '' }}{{ m.content }} [/I]
{%- elif m.role == 'tool' %}[R {{ m.tool_call_id }}] {{ m.content }}
{%- elif m.content is defined %} {{ m.content }}{{ eos_token }}{% endif %}
{%- endfor %}""",
    "another name for the assistant": """{{ bos_token }}{% for m in messages -%}
<t>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}</t>
{% endfor %}{% if add_generation_prompt %}<t>model
{% endif %}""",
}
PLAIN: Sequence[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hü?\n", "name": "Ada"},
    {"role": "assistant", "content": "Well, "},
]
CALLING: Sequence[dict[str, Any]] = [
    {"role": "user", "content": "The weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": "é"}}}
        ],
    },
    {"role": "tool", "content": "wet", "tool_call_id": "c1", "name": "f"},
    {"role": "assistant", "content": "It  rains \n"},
]
TOOLS: Sequence[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": [1.5, None, True]}}}
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def processes() -> Iterator[TextProcesses]:
    made = TextProcesses(1)
    yield made
    made.close()


def as_turns(messages: Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
    return [ChatMessage(**message) for message in messages]


@pytest.mark.parametrize("conversation", [PLAIN, CALLING, PLAIN[:1], CALLING[:3]])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"enable_thinking": False, "date_string": "2 Feb"},
        {"tools": TOOLS},
    ],
    ids=str,
)
def test_a_conversation_is_rendered_as_transformers_renders_it(
    theirs: Any,
    processes: TextProcesses,
    conversation: Sequence[dict[str, Any]],
    name: str,
    how: dict[str, Any],
) -> None:
    template = TEMPLATES[name]
    special = theirs.special_tokens_map
    options = {
        key: how[key] for key in ("tools", "add_generation_prompt", "continue_final_message") if key in how
    }
    rendering = Rendering(
        **options, variables={key: value for key, value in how.items() if key not in options}
    )
    if "tools" in how and "tools" not in template:
        for render in (render_chat, processes.render):
            with pytest.raises(FieldInvalidError, match=r"chat\.tools: the chat template does not read"):
                render(template, as_turns(conversation), special, rendering)
        return
    how = {"add_generation_prompt": True} | how
    try:
        expected = theirs.apply_chat_template(
            list(conversation), chat_template=template, tokenize=False, **how
        )
    except Exception:  # noqa: BLE001 a template raises anything
        expected = None
    for render in (render_chat, processes.render):
        with nullcontext() if expected is not None else pytest.raises(FieldInvalidError):
            assert render(template, as_turns(conversation), special, rendering) == expected
    assert (expected is None) == (name == "tiny" and conversation in (CALLING, CALLING[:3]))


@needs_golden
@pytest.mark.real_model
@pytest.mark.parametrize("is_continued", [False, True])
def test_the_default_models_template(is_continued: bool) -> None:
    directory = default_model_directory()
    ours, theirs = Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)
    how = {"add_generation_prompt": not is_continued, "continue_final_message": is_continued}
    expected = theirs.apply_chat_template(list(PLAIN), tokenize=False, **how)
    assert ours.render_chat(as_turns(PLAIN), rendering=Rendering(**how)) == expected


def test_ids_of_calls_are_as_long_as_a_template_takes_them() -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ c.id }},{% endfor %}"
    plain = "{% for m in messages %}{{ m.tool_call_id }}" + calls + ";{% endfor %}"
    strict = plain.replace(
        "{{ c.id", "{% if c.id|length != 9 %}{{ raise_exception('no') }}{% endif %}{{ c.id"
    )
    ids = ["call_0123456789abcdef01234567", "123456789"]
    made = [{"id": each, "function": {"name": "f", "arguments": {}}} for each in ids]
    turns = [ChatMessage("assistant", None, tool_calls=made)]
    turns += [ChatMessage("tool", "ü", tool_call_id=each) for each in ids]
    assert render_chat(plain, turns, {}) == f"{','.join(ids)},;" + "".join(f"{each};" for each in ids)
    short = [each[-9:] for each in ids]
    assert render_chat(strict, turns, {}) == f"{','.join(short)},;" + "".join(f"{each};" for each in short)


@pytest.mark.parametrize("name", ["another name for the assistant", "tiny"])
def test_developer_is_system_to_a_template_that_does_not_know_it(name: str) -> None:
    def rendered(template: str, role: str) -> str:
        return render_chat(template, [ChatMessage(role, "Be brief."), ChatMessage("user", "hi")], {})

    template = TEMPLATES[name]
    assert rendered(template, "developer") == rendered(template, "system")
    knows = template + "{# developer #}"
    assert rendered(knows, "developer") == rendered(template, "system").replace("system", "developer", 1)


@pytest.mark.parametrize("content", ["", "  ", "a\n\n", "the final message is continued here"])
def test_a_continued_message_ends_the_text(content: str) -> None:
    how = Rendering(add_generation_prompt=False, continue_final_message=True)
    kept = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    messages = [ChatMessage("user", "hi"), ChatMessage("assistant", content)]
    assert render_chat(kept, messages, {}, how) == f"<user>hi</><assistant>{content}"
    trims = kept.replace("m.content", "m.content | trim")
    assert render_chat(trims, messages, {}, how) == f"<user>hi</><assistant>{content}".rstrip()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].role }}", ChatMessage("user", "hi")),
        ("{{ messages[0].content[:1] }}", ChatMessage("user", "hi")),
        ("{{ messages[0].content | upper }}", ChatMessage("user", "hi")),
        ("{{ messages | length }}", ChatMessage("assistant", None, tool_calls=[{}])),
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(
    processes: TextProcesses, template: str, message: ChatMessage
) -> None:
    how = Rendering(add_generation_prompt=False, continue_final_message=True)
    for render in (render_chat, processes.render):
        with pytest.raises(FieldInvalidError) as caught:
            render(template, [message], {}, how)
        assert caught.value.field == "chat.continue_final_message"


def test_a_text_ends_in_one_way() -> None:
    with pytest.raises(FieldInvalidError) as caught:
        Rendering(add_generation_prompt=True, continue_final_message=True)
    assert caught.value.field == "chat.continue_final_message"
