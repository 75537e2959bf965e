"""Request building and response conversion, without a server."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.client import (
    ChatMessage,
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
    assert GenerateOptions.__annotations__.keys() == fields - sections - prompt_fields == OPTIONS.keys()


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
    assert convert.tokenize_request(prompt, "", None).WhichOneof("prompt") == arm
    assert convert.score_request(prompt, ["x"], "", {}).WhichOneof("prompt") == arm


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
        ([{"role": "user"}], "chat.messages[0]"),
        ([ChatMessage("user", "hi"), "hello"], "chat.messages[1]"),
        ([{"role": "user", "content": 3}], "chat.messages[0].content"),
    ],
)
def test_prompt_of_a_wrong_type_names_where(prompt: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build(prompt)
    assert caught.value.field == field


def test_unknown_option_is_a_type_error() -> None:
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
