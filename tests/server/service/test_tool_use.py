"""What is refused of tools and of the choice between them, and which wrapping a template has."""

from __future__ import annotations

from typing import Any

import pytest

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.server.service.tool_use import ToolUse
from manyhats.server.service.tool_wrappings import WRAPPINGS, wrapping_of
from support.factories.tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from support.factories.tool_models import CLOCK, FAMILIES, WEATHER, tool

BAD: list[tuple[str, dict[str, Any]]] = [
    ("chat.tools", {"tools": [CLOCK] * 129}),
    ("chat.tools[1]", {"tools": [CLOCK, "clock"]}),
    ("chat.tools[0]", {"tools": [{"type": "function"}]}),
    ("chat.tools[0]", {"tools": [{"type": "custom", "custom": {"name": "f"}}]}),
    ("chat.tools[0]", {"tools": [{"function": {"name": "f"}}]}),
    *(
        ("chat.tools[0].function.name", {"tools": [tool(name)]})
        for name in ("", "a b", "a.b", "é", "a" * 65, 'a"', "a\n", 5, None)
    ),
    ("chat.tools[1].function.name", {"tools": [CLOCK, CLOCK]}),
    *(
        ("chat.tools[1].function.parameters", {"tools": [CLOCK, tool("f", parameters)]})
        for parameters in (
            "text",
            [],
            True,
            {"type": "string"},
            {"type": ["object", "null"]},
        )
    ),
    ("chat.tool_choice", {"choice": "required"}),
    ("chat.tool_choice", {"tools": [CLOCK], "choice": "required", "only": "weather"}),
    ("chat.tool_choice", {"tools": [CLOCK], "choice": "required", "only": ""}),
]


@pytest.mark.parametrize(
    ("field", "fields"), BAD, ids=[f"{index} {each[0]}" for index, each in enumerate(BAD)]
)
def test_what_is_out_of_bounds_is_refused_by_its_name(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(FieldInvalidError) as caught:
        ToolUse(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "parameters", [{"$ref": "http://example.org/a"}, {"description": "x" * 70_000}, {"items": {"$ref": "a"}}]
)
@pytest.mark.parametrize("only", [None, "f"])
def test_parameters_have_the_bounds_of_a_constraint(parameters: Any, only: str | None) -> None:
    family = FAMILIES["hermes"]
    tokenizer = Tokenizer(family.tokenizer(), special_tokens={}, chat_template=family.template)
    use = ToolUse(tools=[CLOCK, tool("f", parameters)], choice="required", only=only)
    with pytest.raises(FieldInvalidError) as caught:
        use.constraint(tokenizer, {2})
    assert caught.value.field == "chat.tools[1].function.parameters"


def test_a_required_function_is_the_only_one() -> None:
    use = ToolUse(tools=[CLOCK, WEATHER], choice="required", only="weather")
    assert [each.name for each in use.functions] == ["weather"]


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_without_tools_nothing_is_called(choice: Any) -> None:
    assert not ToolUse(choice=choice).may_call
    assert ToolUse(tools=[CLOCK], choice=choice).may_call is (choice == "auto")


def test_each_wrapping_is_recognized() -> None:
    found = {name: wrapping_of(family.template) for name, family in FAMILIES.items()}
    assert set(found.values()) == set(WRAPPINGS)
    for name, wrapping in found.items():
        assert wrapping.family.startswith(name.partition(" ")[0].partition(",")[0].capitalize())


@pytest.mark.parametrize(
    "template",
    [
        "",
        CHAT_TEMPLATE,
        "{{ tools }}<tool_call>\n<function={{ name }}>",
        '{{ tools }}<|tool_call|>[{"name": "f", "arguments": {}}]',
        '{{ tools }}<tool_call>{"arguments": 1}',
        '{{ tools }}[{"tool_name": "f", "parameters": {}}, {"name": 1}]',
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_another_wrapping_is_refused(template: str, choice: Any) -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), special_tokens={}, chat_template=template)
    with pytest.raises(FieldInvalidError, match="tool_choice none") as caught:
        ToolUse(tools=[CLOCK], choice=choice).constraint(tokenizer, {2})
    assert caught.value.field == "chat.tools"
