"""Calls of tools through the ``openai`` package, which checks every answer, on models that say what they must."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from support.factories.saying_model import make_saying_checkpoint
from support.factories.tiny_models import SPECIAL_TOKENS, make_checkpoint, save_tokenizer
from support.factories.tool_models import CLOCK, FAMILIES, WEATHER, as_token, tool
from support.harnesses import openai_client
from support.harnesses.engine import load_tiny
from support.harnesses.engine_server import served_engine

BOTH: Any = [WEATHER, CLOCK]
ASKED: Any = {
    "model": "echo",
    "messages": [{"role": "user", "content": "hi"}],
    "tools": BOTH,
    "temperature": 0,
    "max_tokens": 200,
}
NAMED: Any = {"type": "function", "function": {"name": "clock"}}
# What models say, in tokens of their own: words, and calls of each family, the last token of which ends them.
SAID: dict[str, tuple[str, ...]] = {
    # What is between the opening and the arguments is forced, character by character.
    "hermes": ("<tool_call>", " ", '{"city": "R', 'ü"', ', "days": 3}'),
    "mistral": (
        "[TOOL_CALLS]",
        '[{"name": "weather", "arguments": ',
        '{"city": "R',
        'ü"',
        ', "days": 3}',
        '}, {"name": "clock", "arguments": ',
        "{}}]",
    ),
    "llama": ('{"name": "weather"', ', "parameters": ', '{"city": "R', 'ü"', ', "days": 3}', "}"),
}
RAIN = ("weather", '{"city": "Rü", "days": 3}')
CALLS = {"hermes": [RAIN], "mistral": [RAIN, ("clock", "{}")], "llama": [RAIN]}


@asynccontextmanager
async def client_of(directory: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    """A strict client of a model."""
    async with served_engine(load_tiny(directory)) as served, openai_client.client_of(served) as client:
        yield client


def saying(directory: Path, family: str, pieces: Sequence[str]) -> Path:
    """A model that says these texts, each as a token of its own."""
    made = FAMILIES[family]
    tokenizer = made.tokenizer(*(each for each in pieces if each not in (*made.tokens, *SPECIAL_TOKENS)))
    ids = [tokenizer.token_to_id(as_token(each)) for each in pieces]
    return make_saying_checkpoint(directory, ids, tokenizer, chat_template=made.template)


def asked_of(family: str) -> Any:
    return {**ASKED, "tools": [WEATHER] if family == "hermes" else BOTH}


def said(message: Any) -> tuple[str | None, list[tuple[str, str]]]:
    return message.content, [
        (call.function.name, call.function.arguments) for call in message.tool_calls or ()
    ]


async def streamed(client: openai.AsyncOpenAI, **asked: Any) -> list[tuple[str, list[tuple[str, str]], str]]:
    """Text, calls and reason of each choice of a stream, put together as its clients do."""
    found: dict[int, tuple[list[str], list[list[str]], list[str]]] = {}
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        texts, calls, reasons = found.setdefault(choice.index, ([], [], []))
        assert not reasons, "there is nothing after the reason"
        texts.append(choice.delta.content or "")
        for call in choice.delta.tool_calls or ():
            if call.id:
                assert (call.index, call.type, call.function.arguments) == (len(calls), "function", "")
                calls.append([call.function.name, ""])
            else:
                assert (call.index, call.function.name) == (len(calls) - 1, None)
                calls[-1][1] += call.function.arguments
        reasons += [choice.finish_reason] if choice.finish_reason else []
    return [
        ("".join(texts), [(name, arguments) for name, arguments in calls], reasons[0])
        for _, (texts, calls, reasons) in sorted(found.items())
    ]


@pytest.mark.parametrize(
    ("family", "ahead"),
    # A call of Llama's is the whole answer.
    [*((family, ()) for family in SAID), ("hermes", ("Well", ", see:")), ("mistral", ("Well", ", see:"))],
)
async def test_a_call_comes_whole_and_in_pieces(family: str, ahead: tuple[str, ...], tmp_path: Path) -> None:
    async with client_of(saying(tmp_path / "model", family, (*ahead, *SAID[family]))) as client:
        whole = (await client.chat.completions.create(**asked_of(family))).choices[0]
        assert said(whole.message) == ("".join(ahead) or None, CALLS[family])
        assert whole.finish_reason == "tool_calls"
        assert await streamed(client, **asked_of(family)) == [("".join(ahead), CALLS[family], "tool_calls")]
        # Without a choice there are no calls, and their tokens are text.
        text = (await client.chat.completions.create(**asked_of(family), tool_choice="none")).choices[0]
        assert text.message.tool_calls is None
        assert '"city"' in (text.message.content or "")
        assert text.finish_reason == "length"


async def test_text_alone_is_the_answer(tmp_path: Path) -> None:
    async with client_of(saying(tmp_path / "model", "hermes", ("Well", ", see", "<|im_end|>"))) as client:
        choice = (await client.chat.completions.create(**ASKED)).choices[0]
        assert (said(choice.message), choice.finish_reason) == (("Well, see", []), "stop")
        assert choice.message.tool_calls is None
        assert await streamed(client, **ASKED) == [("Well, see", [], "stop")]


async def test_each_of_several_answers_has_its_own_calls(tmp_path: Path) -> None:
    asked = {**ASKED, "n": 3, "temperature": 1.0, "seed": 5, "tool_choice": "required"}
    asked["tools"] = [
        tool(
            "f", {"properties": {"a": {"enum": [1, 2, 3]}}, "required": ["a"], "additionalProperties": False}
        )
    ]
    directory = make_checkpoint(tmp_path / "model", seed=4)
    family = FAMILIES["mistral 11"]
    save_tokenizer(directory, family.tokenizer(), chat_template=family.template)
    async with client_of(directory) as client:
        answer = await client.chat.completions.create(**asked, logprobs=True)
        whole = [(*said(choice.message), choice.finish_reason) for choice in answer.choices]
        assert [("" if text is None else text, *rest) for text, *rest in whole] == await streamed(
            client, **asked
        )
        assert len({str(calls) for _, calls, _ in whole}) > 1
        ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or ()]
        assert len(set(ids)) == len(ids)


async def test_a_call_that_is_cut_has_what_there_is_of_it(tmp_path: Path) -> None:
    async with client_of(saying(tmp_path / "model", "mistral", SAID["mistral"])) as client:
        asked = {**ASKED, "max_tokens": 4}
        choice = (await client.chat.completions.create(**asked)).choices[0]
        assert said(choice.message) == (None, [("weather", '{"city": "Rü"')])
        assert choice.finish_reason == "length"
        assert await streamed(client, **asked) == [("", [("weather", '{"city": "Rü"')], "length")]
        asked = {**ASKED, "stop": '"days'}
        choice = (await client.chat.completions.create(**asked)).choices[0]
        assert (choice.message.content, choice.finish_reason) == (None, "stop")
        assert said(choice.message) == (None, [("weather", '{"city": "Rü", ')])
        assert await streamed(client, **asked) == [("", [("weather", '{"city": "Rü", ')], "stop")]


@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_a_required_call_is_made_whatever_the_model_would_say(choice: Any, tmp_path: Path) -> None:
    async with client_of(saying(tmp_path / "model", "hermes", ("Well", ", see"))) as client:
        answer = (
            await client.chat.completions.create(**ASKED, tool_choice=choice, parallel_tool_calls=False)
        ).choices[0]
        (call,) = answer.message.tool_calls or ()
        assert answer.message.content is None
        assert answer.finish_reason == "tool_calls"
        assert call.type == "function"
        if choice is NAMED:
            assert call.function.name == "clock"
            assert json.loads(call.function.arguments) == {}


@pytest.mark.parametrize("family", SAID)
async def test_answers_are_sent_back_and_rendered_as_transformers_does(family: str, tmp_path: Path) -> None:
    directory = saying(tmp_path / "model", family, SAID[family])
    async with client_of(directory) as client:
        message = (await client.chat.completions.create(**asked_of(family))).choices[0].message
        calls: Any = message.tool_calls
        turns: Any = [
            *ASKED["messages"],
            message.model_dump(),
            *({"role": "tool", "tool_call_id": call.id, "content": "ü"} for call in calls),
        ]
        again = await client.chat.completions.create(
            **{**asked_of(family), "messages": turns}, extra_body={"return_token_ids": True}
        )
    theirs: Any = AutoTokenizer.from_pretrained(directory)
    for call in turns[1]["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    expected = theirs.apply_chat_template(
        turns, tools=asked_of(family)["tools"], add_generation_prompt=True, return_dict=False
    )
    assert again.prompt_token_ids == expected


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown function": ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    "no tools": ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    "another word": ({"tool_choice": "maybe"}, "tool_choice"),
    "unknown keyword": ({"tools": [CLOCK, tool("f", {"not": {}})]}, "tools"),
    "a reference elsewhere": (
        {"tools": [CLOCK, tool("f", {"$ref": "file:///etc/passwd"})]},
        "tools[1].function.parameters",
    ),
    "no name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "two constraints": ({"response_format": {"type": "json_object"}}, "tool_choice"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_tools_are_refused(name: str, tmp_path: Path) -> None:
    fields, param = BAD[name]
    async with client_of(saying(tmp_path / "model", "hermes", ("Well", "!"))) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**{**ASKED, **fields})
        assert (caught.value.param, caught.value.code) == (param, "invalid_value")
        if name == "unknown keyword":
            assert "parameters of function 2 of 2" in caught.value.message


@pytest.mark.parametrize(
    ("template", "problem"),
    [("{{ messages[0].content }}", "does not read tools"), ("{{ tools }}{{ messages[0].content }}", "known")],
)
async def test_templates_without_a_known_wrapping_make_no_calls(
    template: str, problem: str, tmp_path: Path
) -> None:
    directory = make_saying_checkpoint(tmp_path / "model", [70, 71], chat_template=template)
    async with client_of(directory) as client:
        with pytest.raises(openai.BadRequestError, match=problem) as caught:
            await client.chat.completions.create(**ASKED)
        assert caught.value.param == "tools"
        if "tools" in template:
            answer = await client.chat.completions.create(**ASKED, tool_choice="none")
            assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize("ahead", [(), ("Well", ", see:")])
async def test_a_response_has_its_calls_as_items(ahead: tuple[str, ...], tmp_path: Path) -> None:
    tools: Any = [{"type": "function", **each["function"], "strict": None} for each in BOTH]
    asked: Any = {"model": "echo", "input": "hi", "tools": tools, "temperature": 0, "max_output_tokens": 200}
    text = "".join(ahead)
    async with client_of(saying(tmp_path / "model", "mistral", (*ahead, *SAID["mistral"]))) as client:
        whole = await client.responses.create(**asked)
        events = [event async for event in await client.responses.create(**asked, stream=True)]
        items = [*whole.output]
        if text:
            assert (whole.output_text, items.pop(0).type) == (text, "message")
        calls = [item for item in items if item.type == "function_call"]
        assert [(call.name, call.arguments) for call in calls] == CALLS["mistral"]
        assert {item.status for item in calls} == {"completed"} == {whole.status}
        # The events, put together, are the same.
        last: Any = events[-1]
        assert [_shown(item) for item in last.response.output] == [_shown(item) for item in whole.output]
        done = [event.item for event in events if event.type == "response.output_item.done"]
        assert done == last.response.output
        pieces = [""] * len(done)
        for event in events:
            if event.type in ("response.output_text.delta", "response.function_call_arguments.delta"):
                pieces[event.output_index] += event.delta
        assert pieces == [*([text] if text else []), *(arguments for _, arguments in CALLS["mistral"])]
        # And they are one turn of the next request's conversation.
        answers = [{"type": "function_call_output", "call_id": each.call_id, "output": "ü"} for each in calls]
        turns: Any = [{"role": "user", "content": "hi"}, *whole.output, *answers]
        again = await client.responses.create(**{**asked, "input": turns})
        assert again.usage is not None
        messages = [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": text or None,
                "tool_calls": [
                    {
                        "id": each.call_id,
                        "type": "function",
                        "function": {"name": each.name, "arguments": each.arguments},
                    }
                    for each in calls
                ],
            },
            *({"role": "tool", "tool_call_id": each.call_id, "content": "ü"} for each in calls),
        ]
        chat = await client.chat.completions.create(**{**ASKED, "messages": messages})
        assert chat.usage is not None
        assert again.usage.input_tokens == chat.usage.prompt_tokens


def _shown(item: Any) -> dict[str, Any]:
    return {name: value for name, value in item.model_dump().items() if name not in ("id", "call_id")}


async def test_a_response_with_tools_has_no_logprobs(tmp_path: Path) -> None:
    async with client_of(saying(tmp_path / "model", "hermes", ("Well", "!"))) as client:
        tools: Any = [{"type": "function", "name": "f", "parameters": {"not": {}}, "strict": None}]
        for fields, param in (({"top_logprobs": 1}, "include"), ({}, "tools")):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.responses.create(model="echo", input="hi", tools=tools, **fields)
            assert caught.value.param == param
