"""Request building and response conversion, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.client import (
    ChatMessage,
    ChatOptions,
    FinishReason,
    GenerateOptions,
    GenerationChunk,
    InvalidRequestError,
    adapter_convert,
    convert,
)
from manyhats.client.results import Token, Usage
from manyhats.v1 import adapter_pb2, generation_pb2

OPTIONS: GenerateOptions = {
    "request_id": "r-1",
    "add_special_tokens": False,
    "cache_salt": "tenant",
    "priority": -3,
    "num_sequences": 3,
    "temperature": 0.5,
    "top_k": 40,
    "top_p": 0.75,
    "min_p": 0.125,
    "typical_p": 0.875,
    "repetition_penalty": 1.25,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "seed": 2**64 - 1,
    "logit_bias": {5: -100.0},
    "max_new_tokens": 9,
    "min_new_tokens": 2,
    "stop_sequences": ["END", "\n\n"],
    "stop_token_ids": [2, 3],
    "include_stop_sequence": True,
    "skip_special_tokens": False,
    "ignore_eos": True,
    "time_limit_ms": 1500.0,
    "logprobs": True,
    "top_logprobs": 4,
    "prompt_logprobs": True,
}


def build(prompt: Any = "hi", **options: Any) -> generation_pb2.GenerateRequest:
    return convert.generate_request(prompt, "sql@2", options)


def test_how_far_to_guess_has_a_message_of_its_own() -> None:
    assert build(speculation=3).speculation.num_tokens == 3
    assert build(speculation=0).speculation.HasField("num_tokens")
    assert not build(speculation=None).HasField("speculation")
    with pytest.raises(InvalidRequestError, match=r"speculation\.num_tokens"):
        build(speculation=-1)
    usage = generation_pb2.Usage(draft_tokens=5, accepted_draft_tokens=2)
    found = convert.generation(generation_pb2.GenerateResponse(usage=usage)).usage
    assert (found.draft_tokens, found.accepted_draft_tokens) == (5, 2)


def test_every_option_lands_in_its_field() -> None:
    request = build(**OPTIONS)
    sections = [request, request.sampling, request.stopping, request.response]
    for name, expected in OPTIONS.items():
        section = next(s for s in sections if name in s.DESCRIPTOR.fields_by_name)
        value = getattr(section, name)
        assert (
            dict(value) if name == "logit_bias" else list(value) if isinstance(expected, list) else value
        ) == (expected), name
    assert request.task_id == "sql@2"


def test_options_are_exactly_the_fields_of_the_api() -> None:
    prompt_fields = {"task_id", "text", "token_ids", "chat"}
    fields = {field.name for field in generation_pb2.GenerateRequest.DESCRIPTOR.fields}
    sections = {"sampling", "stopping", "response"}
    for message in (
        generation_pb2.SamplingParams,
        generation_pb2.StoppingParams,
        generation_pb2.ResponseOptions,
    ):
        fields |= {field.name for field in message.DESCRIPTOR.fields}
    of_chat = {field.name for field in generation_pb2.ChatMessages.DESCRIPTOR.fields} - {"messages"}
    assert ChatOptions.__annotations__.keys() == of_chat
    assert GenerateOptions.__annotations__.keys() - of_chat == fields - sections - prompt_fields
    constraints = {"json_schema", "regex", "grammar", "choice"}
    assert OPTIONS.keys() == fields - sections - prompt_fields - constraints - {"speculation"}


@pytest.mark.parametrize(
    ("option", "value", "sent"),
    [
        ("json_schema", {"type": "string", "const": "é"}, '{"type": "string", "const": "é"}'),
        ("json_schema", '{"type":"null"}', '{"type":"null"}'),
        ("regex", "[ab]+", "[ab]+"),
        ("grammar", 'start: "a"', 'start: "a"'),
        ("choice", ("yes", "no"), ["yes", "no"]),
        ("choice", [], []),
    ],
)
def test_a_constraint_fills_one_arm(option: Any, value: Any, sent: Any) -> None:
    request = build(**{option: value, "seed": 1})
    assert request.WhichOneof("constraint") == option
    assert (list(request.choice.options) if option == "choice" else getattr(request, option)) == sent
    assert build(**{option: None}).WhichOneof("constraint") is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"regex": "a", "choice": ["b"]}, "choice: is given besides regex"),
        ({"choice": "yes"}, "choice: must be several texts"),
        ({"regex": 5}, "regex: "),
        ({"grammar": {"a": 1}}, "grammar: "),
    ],
)
def test_constraints_that_cannot_be_sent_are_refused(options: Any, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        build(**options)


def test_options_left_out_or_none_stay_unset() -> None:
    request = build(temperature=None, max_new_tokens=None, logprobs=None)
    assert not request.HasField("sampling")
    assert not request.HasField("stopping")
    assert not request.HasField("response")
    assert not request.HasField("add_special_tokens")


def test_temperature_zero_is_set_not_left_out() -> None:
    assert build(temperature=0.0).sampling.HasField("temperature")


def test_one_stop_sequence_may_be_given_alone() -> None:
    assert list(build(stop_sequences="END").stopping.stop_sequences) == ["END"]


@pytest.mark.parametrize(
    ("prompt", "arm"),
    [
        ("text", "text"),
        ("", "text"),
        ([1, 2], "token_ids"),
        ((), "token_ids"),
        ([ChatMessage("user", "hi")], "chat"),
        ([{"role": "user", "content": "hi"}], "chat"),
    ],
)
def test_prompt_fills_one_arm(prompt: Any, arm: str) -> None:
    assert build(prompt).WhichOneof("prompt") == arm
    assert convert.tokenize_request(prompt, "", None, {}).WhichOneof("prompt") == arm
    assert convert.score_request(prompt, ["x"], "", {}).WhichOneof("prompt") == arm


def test_further_answers_are_whole_answers_too() -> None:
    first = generation_pb2.GenerateResponse(
        text="a",
        request_id="r",
        finish_reason=generation_pb2.FINISH_REASON_EOS,
        prompt_tokens=[generation_pb2.TokenInfo(id=1)],
        more_sequences=[
            generation_pb2.GeneratedSequence(
                text="b",
                tokens=[generation_pb2.TokenInfo(id=7)],
                finish_reason=generation_pb2.FINISH_REASON_LENGTH,
                usage=generation_pb2.Usage(generated_tokens=1),
            )
        ],
    )
    answer = convert.generation(first)
    assert [each.text for each in answer.sequences] == ["a", "b"]
    (more,) = answer.more
    assert (more.request_id, more.finish_reason, more.prompt_tokens) == ("r", FinishReason.LENGTH, ())
    assert (more.tokens[0].id, more.usage.generated_tokens) == (7, 1)


def test_mixed_chunks_are_joined_by_their_answer() -> None:
    pieces = [(0, "a"), (2, "x"), (0, "b"), (1, "m"), (2, "y"), (1, "n")]
    chunks = [GenerationChunk(text=text, sequence_index=index) for index, text in pieces]
    assert [each.text for each in convert.join_chunks(chunks).sequences] == ["ab", "mn", "xy"]
    assert [each.text for each in convert.join_chunks(chunks[:2]).sequences] == ["a", "", "x"]
    assert [each.text for each in convert.join_chunks([]).sequences] == [""]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_token_ids_arrive_as_they_are(ids: list[int]) -> None:
    assert list(build(ids).token_ids.ids) == ids


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": -1}, "sampling.top_k"),
        ({"seed": 2**64}, "sampling.seed"),
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"logit_bias": {-1: 1.0}}, "sampling.logit_bias"),
        ({"max_new_tokens": 1.5}, "stopping.max_new_tokens"),
        ({"stop_sequences": 7}, "stopping.stop_sequences"),
        ({"stop_sequences": [7]}, "stopping.stop_sequences"),
        ({"top_logprobs": -1}, "response.top_logprobs"),
        ({"priority": 2**40}, "priority"),
    ],
)
def test_value_that_no_field_can_hold_names_the_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build(**options)
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ([1, -2], "token_ids"),
        ([1, "two"], "token_ids"),
        (7, "prompt"),
        ([{"role": "user"}], "chat.messages[0].content"),
        ([{"content": "hi"}], "chat.messages[0]"),
        ([{"role": "user", "content": "hi", "mood": "good"}], "chat.messages[0]"),
        ([{"role": "assistant", "tool_calls": [{"id": "c"}]}], "chat.messages[0].tool_calls[0]"),
        ([ChatMessage("user", "hi"), "hello"], "chat.messages[1]"),
        ([{"role": "user", "content": 3}], "chat.messages[0].content"),
    ],
)
def test_prompt_of_a_wrong_type_names_where(prompt: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build(prompt)
    assert caught.value.field == field


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": "é"}}}


def test_a_conversation_with_tools_is_sent_as_it_is() -> None:
    messages = [
        ChatMessage("user", "hi", name="Ada"),
        ChatMessage(
            "assistant", None, tool_calls=[{"id": "c", "function": {"name": "f", "arguments": {"b": 1}}}]
        ),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "g", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "", "tool_call_id": "c"},
    ]
    options = {
        "tools": [TOOL],
        "template_arguments": {"enable_thinking": False},
        "continue_final_message": True,
    }
    chat = build(messages, **options, add_generation_prompt=False).chat
    assert [(each.role, each.content, each.name, each.tool_call_id) for each in chat.messages] == [
        ("user", "hi", "Ada", ""),
        ("assistant", "", "", ""),
        ("assistant", "", "", ""),
        ("tool", "", "", "c"),
    ]
    calls = [(call.id, call.name, call.arguments) for each in chat.messages for call in each.tool_calls]
    assert calls == [("c", "f", '{"b": 1}'), ("", "g", "{}")]
    assert [json.loads(tool) for tool in chat.tools] == [TOOL]
    assert dict(chat.template_arguments) == {"enable_thinking": False}
    assert chat.continue_final_message
    assert chat.HasField("add_generation_prompt")
    for request in (
        convert.tokenize_request(messages, "", None, options),
        convert.score_request(messages, ["x"], "", options),
    ):
        assert request.chat.tools == chat.tools
        assert not request.chat.HasField("add_generation_prompt")


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("text", {"tools": [TOOL]}, "chat.tools"),
        ([1], {"continue_final_message": True}, "chat.continue_final_message"),
        ([ChatMessage("user", "hi")], {"tools": [object()]}, "chat.tools"),
        ([ChatMessage("user", "hi")], {"template_arguments": {"a": object()}}, "chat.template_arguments"),
        ([ChatMessage("user", "hi")], {"add_generation_prompt": "no"}, "chat.add_generation_prompt"),
    ],
)
def test_options_of_a_conversation_that_do_not_fit(prompt: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build(prompt, **options)
    assert caught.value.field == field


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="temperature"):
        convert.tokenize_request("a", "", None, {"temperature": 1.0})
    with pytest.raises(TypeError, match="temprature"):
        build(temprature=1.0)
    with pytest.raises(TypeError, match="temperature"):
        convert.score_request("a", ["b"], "", {"temperature": 1.0})


def test_one_text_as_continuations_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="several"):
        convert.score_request("a", "bcd", "", {})


def test_continuations_are_texts_or_token_ids() -> None:
    request = convert.score_request("a", [" yes", [4, 5]], "", {"priority": 2})
    assert request.continuations[0].text == " yes"
    assert list(request.continuations[1].token_ids.ids) == [4, 5]
    assert request.priority == 2


def test_token_without_logprob_has_none() -> None:
    response = generation_pb2.GenerateResponse(tokens=[generation_pb2.TokenInfo(id=3, text="x")])
    assert convert.generation(response).tokens == (Token(3, "x", None, None, ()),)


def test_base_model_has_no_adapter() -> None:
    assert convert.generation(generation_pb2.GenerateResponse()).adapter is None


def test_values_newer_than_the_client_do_not_fail() -> None:
    response = generation_pb2.GenerateResponse(finish_reason=77)  # type: ignore[arg-type]
    assert convert.generation(response).finish_reason is FinishReason.UNSPECIFIED
    assert adapter_convert.adapter_info(adapter_pb2.Adapter(method=77)).method == "77"  # type: ignore[arg-type]


def test_fields_the_server_leaves_out_are_none_or_empty() -> None:
    info = adapter_convert.adapter_info(adapter_pb2.Adapter(task_id="sql", version=3))
    assert (info.name, info.create_time, info.effect, info.method, info.residency) == (
        "sql@3",
        None,
        None,
        "",
        "",
    )


@given(st.lists(st.text(max_size=4), min_size=1, max_size=6))
def test_joined_chunks_are_the_whole_answer(pieces: list[str]) -> None:
    chunks = [GenerationChunk(text=text, tokens=(Token(i, text),)) for i, text in enumerate(pieces)]
    chunks.append(
        GenerationChunk(text="", finish_reason=FinishReason.EOS, usage=Usage(generated_tokens=len(pieces)))
    )
    whole = convert.join_chunks(chunks)
    assert whole.text == "".join(pieces)
    assert [token.id for token in whole.tokens] == list(range(len(pieces)))
    assert (whole.finish_reason, whole.usage.generated_tokens) == (FinishReason.EOS, len(pieces))


def test_no_chunks_make_an_empty_unfinished_answer() -> None:
    assert convert.join_chunks([]).finish_reason is FinishReason.UNSPECIFIED


def test_parts_of_a_composed_task_keep_order_and_weight() -> None:
    request = adapter_convert.register_request("sql", "", [("a", 0.5), ("b", 1)], {})
    assert [(part.uri, part.weight) for part in request.parts] == [("a", 0.5), ("b", 1.0)]
    assert request.uri == ""


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        (["a"], "parts[0]"),
        ([("a", 1.0), ("b",)], "parts[1]"),
        ([("a", "heavy")], "parts[0].weight"),
        ([(5, 1.0)], "parts[0].uri"),
    ],
)
def test_wrong_part_is_named(parts: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        adapter_convert.register_request("sql", "", parts, {})
    assert caught.value.field == field


def test_registration_options_left_out_or_none_stay_unset() -> None:
    request = adapter_convert.register_request("sql", "a", (), {"activate": None, "labels": {"team": "a"}})
    assert not request.HasField("activate")
    assert dict(request.labels) == {"team": "a"}
    header = adapter_convert.upload_header("sql", (), {"activate": False, "expected_digest": "sha256:00"})
    assert (header.HasField("activate"), header.activate, header.expected_digest) == (
        True,
        False,
        "sha256:00",
    )


def test_unknown_registration_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="'color'"):
        adapter_convert.register_request("sql", "a", (), {"color": "red"})
    with pytest.raises(InvalidRequestError) as caught:
        adapter_convert.upload_header("sql", (), {"labels": {"team": 1}})
    assert caught.value.field == "labels"
