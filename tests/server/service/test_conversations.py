"""Conversations from callers: what is refused, by which name, and how they reach the template."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.text.chat_template import ChatMessage, Rendering
from manyhats.server.grpc import from_proto
from manyhats.server.service.conversations import (
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    TEMPLATE_ARGUMENTS,
    ChatPrompt,
)
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import refused, running_server

USER = ChatMessage("user", "hi")


def deep(levels: int) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for _ in range(levels):
        nested = {"a": [nested]}
    return nested


def calling(**call: Any) -> dict[str, Any]:
    return {"messages": (USER, ChatMessage("assistant", None, tool_calls=[call]))}


CALL = "chat.messages[1].tool_calls[0]"
BAD: list[tuple[str, dict[str, Any]]] = [
    ("chat.messages", {"messages": ()}),
    ("chat.messages", {"messages": (USER,) * 1025}),
    ("chat.messages", {"messages": (ChatMessage("user", "x" * 2**20), USER)}),
    ("chat.messages[1].role", {"messages": (USER, ChatMessage("", "hi"))}),
    ("chat.messages[0].role", {"messages": (ChatMessage("r" * 65, "hi"),)}),
    ("chat.messages[0].name", {"messages": (ChatMessage("user", "hi", name="n" * 129),)}),
    ("chat.messages[0].tool_call_id", {"messages": (ChatMessage("tool", "hi", tool_call_id="n" * 129),)}),
    ("chat.messages[0].content", {"messages": (ChatMessage("assistant", None),)}),
    ("chat.messages[0].tool_calls", {"messages": (ChatMessage("user", "hi", tool_calls=[{}]),)}),
    ("chat.messages[0].tool_calls", {"messages": (ChatMessage("assistant", "", tool_calls=[{}] * 129),)}),
    (
        "chat.messages",
        {"messages": (ChatMessage("assistant", "", tool_calls=[{"function": {"name": "f"}}] * 103),) * 10},
    ),
    (f"{CALL}.function", calling(id="c")),
    (f"{CALL}.function", calling(function={"arguments": "{}"})),
    (f"{CALL}.function.arguments", calling(function={"name": "f", "arguments": "[]"})),
    (f"{CALL}.function.arguments", calling(function={"name": "f", "arguments": "{"})),
    (f"{CALL}.function.arguments", calling(function={"name": "f", "arguments": "[" * 100_000})),
    (f"{CALL}.function.arguments", calling(function={"name": "f", "arguments": 5})),
    (CALL, calling(function={"name": "f", "arguments": deep(20)})),
    (CALL, {"messages": (USER, ChatMessage("assistant", None, tool_calls=["f"]))}),
    ("chat.tools", {"tools": [{}] * 129}),
    ("chat.tools[1]", {"tools": [{}, "f"]}),
    ("chat.tools", {"tools": [{"a": float("nan")}]}),
    ("chat.tools", {"tools": [{"a": object()}]}),
    ("chat.tools", {"tools": [deep(100_000)]}),
    ("chat.tools", {"tools": [{"a": "x" * MAX_JSON_BYTES}]}),
    ("chat.template_arguments.chat_template", {"template_arguments": {"chat_template": "x"}}),
    ("chat.template_arguments.tools", {"template_arguments": {"tools": []}}),
    ("chat.template_arguments.bos_token", {"template_arguments": {"bos_token": "<s>"}}),
    ("chat.template_arguments.enable_thinking", {"template_arguments": {"enable_thinking": 0}}),
    ("chat.template_arguments.thinking_budget", {"template_arguments": {"thinking_budget": True}}),
    ("chat.template_arguments", {"template_arguments": {"documents": [deep(20)]}}),
    ("chat.continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
]


@pytest.mark.parametrize(("field", "fields"), BAD)
def test_what_cannot_be_rendered_is_refused_by_its_name(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(FieldInvalidError) as caught:
        ChatPrompt(**({"messages": (USER,)} | fields))
    assert caught.value.field == field


def test_values_at_the_limits() -> None:
    values: dict[type, Any] = {bool: True, str: "a", int: 5, list: [{"text": "b"}], dict: {"c": 1}}
    arguments = {name: values[kinds[0]] for name, kinds in TEMPLATE_ARGUMENTS.items()}
    tools = [deep(MAX_JSON_DEPTH // 2 - 2)] * 128
    prompt = ChatPrompt((USER,) * 1024, tools=tools, template_arguments=arguments)
    assert prompt.rendering == Rendering(variables=arguments, tools=tuple(tools))


@pytest.mark.parametrize("arguments", ['{"b": 1, "a": "é"}', {"b": 1, "a": "é"}])
def test_arguments_of_a_call_are_an_object_to_the_template(arguments: Any) -> None:
    prompt = ChatPrompt(**calling(id="c", function={"name": "f", "arguments": arguments}))
    function = {"name": "f", "arguments": {"b": 1, "a": "é"}}
    assert prompt.messages[1].tool_calls == ({"type": "function", "id": "c", "function": function},)
    without = ChatPrompt(**calling(function={"name": "f"}))
    assert without.messages[1].tool_calls[0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("begins", "continues", "expected"),
    [
        (None, False, (True, False)),
        (None, True, (False, True)),
        (False, False, (False, False)),
        (False, True, (False, True)),
        (True, False, (True, False)),
    ],
)
def test_how_a_prompt_ends(begins: bool | None, continues: bool, expected: tuple[bool, bool]) -> None:
    chat = pb.ChatMessages(
        messages=[pb.ChatMessage(role="user", content="hi")],
        add_generation_prompt=begins,
        continue_final_message=continues,
    )
    prompt = from_proto.prompt(pb.GenerateRequest(chat=chat))
    assert isinstance(prompt, ChatPrompt)
    ends = prompt.rendering.add_generation_prompt, prompt.rendering.continue_final_message
    assert ends == expected


def test_a_message_has_all_that_the_template_reads() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2.5}}}
    arguments = Struct()
    arguments.update({"enable_thinking": False, "thinking_budget": 5, "documents": [{"text": "a"}]})
    call = pb.ToolCall(id="c", name="f", arguments='{"b": 1}')
    chat = pb.ChatMessages(
        messages=[
            pb.ChatMessage(role="user", content="hi", name="Ada"),
            pb.ChatMessage(role="assistant", tool_calls=[call]),
            pb.ChatMessage(role="tool", content="", tool_call_id="c"),
        ],
        tools=[json.dumps(tool)],
        template_arguments=arguments,
    )
    prompt = from_proto.prompt(pb.TokenizeRequest(chat=chat))
    assert isinstance(prompt, ChatPrompt)
    read = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"b": 1}}}
    assert prompt.messages == (
        ChatMessage("user", "hi", name="Ada"),
        ChatMessage("assistant", None, tool_calls=(read,)),
        ChatMessage("tool", "", tool_call_id="c"),
    )
    assert json.dumps(prompt.rendering.tools) == json.dumps([tool])  # also in this order
    assert prompt.rendering.variables == {
        "enable_thinking": False,
        "thinking_budget": 5,
        "documents": [{"text": "a"}],
    }
    assert isinstance(prompt.rendering.variables["thinking_budget"], int)


@pytest.mark.parametrize(
    ("field", "chat"),
    [
        ("chat.tools[1]", {"tools": ["{}", "{"]}),
        ("chat.tools[0]", {"tools": ["[]"]}),
        ("chat.tools", {"tools": ['{"a": NaN}']}),
        ("chat.template_arguments", {"template_arguments": {"documents": [float("inf")]}}),
        ("chat.template_arguments.nothing", {"template_arguments": {"nothing": 1}}),
    ],
)
async def test_a_call_with_a_bad_field_names_it(field: str, chat: dict[str, Any]) -> None:
    arguments = Struct()
    arguments.update(chat.pop("template_arguments", {}))
    messages = [pb.ChatMessage(role="user", content="hi")]
    asked = pb.ChatMessages(messages=messages, template_arguments=arguments, **chat)
    async with running_server() as server:
        refusal = await refused(server.generation.Generate(pb.GenerateRequest(chat=asked)))
    assert refusal.reason == "FIELD_INVALID"
    assert refusal.message.startswith(f"{field}: ")
