"""Any message becomes a valid request or is refused with the name of a field; nothing else comes out."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.errors import ArgumentInvalidError
from manyhats.adapters.registration import OPTIONS, Part, Parts, Uri
from manyhats.adapters.taskid import TASK_ID
from manyhats.client import RegisterOptions
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.request import SamplingParams, SpeculationParams, StoppingParams
from manyhats.server.grpc import from_proto
from manyhats.v1 import adapter_pb2
from manyhats.v1 import generation_pb2 as pb

uint32 = st.integers(0, 2**32 - 1)
doubles = st.floats(allow_nan=True, allow_infinity=True)
some_text = st.text(max_size=20)

samplings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": doubles,
        "top_k": uint32,
        "top_p": doubles,
        "min_p": doubles,
        "typical_p": doubles,
        "repetition_penalty": doubles,
        "presence_penalty": doubles,
        "frequency_penalty": doubles,
        "seed": st.integers(0, 2**64 - 1),
        "logit_bias": st.dictionaries(uint32, st.floats(width=32), max_size=3),
    },
)
stoppings = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": uint32,
        "min_new_tokens": uint32,
        "stop_sequences": st.lists(some_text, max_size=20),
        "time_limit_ms": doubles,
        "stop_token_ids": st.lists(uint32, max_size=5),
    },
)
requests = st.fixed_dictionaries(
    {},
    optional={
        "request_id": some_text,
        "text": some_text,
        "sampling": samplings,
        "stopping": stoppings,
        "response": st.fixed_dictionaries({}, optional={"top_logprobs": uint32}),
        "cache_salt": some_text,
        "json_schema": some_text,
        "speculation": st.fixed_dictionaries({}, optional={"num_tokens": uint32}),
    },
)


@given(requests)
def test_any_request_converts_or_names_a_field(fields: dict[str, Any]) -> None:
    message = pb.GenerateRequest.FromString(pb.GenerateRequest(**fields).SerializeToString())
    for convert in (
        from_proto.prompt,
        lambda message: SamplingParams(**from_proto.sampling(message).over({})),
        lambda message: StoppingParams(**from_proto.stopping(message).over({})),
        lambda message: SpeculationParams(**from_proto.speculation(message).over({})),
        from_proto.response_options,
        from_proto.constraint,
    ):
        try:
            convert(message)
        except FieldInvalidError as error:
            assert error.field.partition(".")[0] in {*fields, "prompt"}  # noqa: PT017


parts = st.lists(st.fixed_dictionaries({"uri": some_text}, optional={"weight": doubles}), max_size=3)
registrations = st.fixed_dictionaries(
    {"task_id": st.from_regex(TASK_ID, fullmatch=True)},
    optional={
        "uri": some_text,
        "parts": parts,
        "activate": st.booleans(),
        "validate_only": st.booleans(),
        "expected_digest": some_text,
        "request_id": some_text,
        "assume_base": st.booleans(),
        "labels": st.dictionaries(some_text, some_text, max_size=3),
    },
)


def is_printable(given: str | dict[str, str]) -> bool:
    """Whether a request id, or labels, may be in a line of a log; a label's key is not empty."""
    if isinstance(given, str):
        return given.isprintable()
    return all(key and (key + value).isprintable() for key, value in given.items())


@given(registrations)
def test_any_registration_has_one_source_or_names_the_field(fields: dict[str, Any]) -> None:
    message = adapter_pb2.RegisterAdapterRequest(**fields)
    try:
        registration = from_proto.registration(message)
    except ArgumentInvalidError as error:
        if error.subject == "uri":
            assert bool(fields.get("uri")) == bool(fields.get("parts"))
        elif not error.subject.startswith("parts["):
            assert not is_printable(fields[error.subject.partition("[")[0]])  # noqa: PT017
        return
    match registration.source:
        case Uri(uri):
            assert uri
            assert not fields.get("parts")
        case Parts(parts):
            assert all(part.uri for part in parts)
            assert not fields.get("uri")
    assert registration.activate == fields.get("activate", True)
    assert registration.validate_only == fields.get("validate_only", False)
    assert registration.assume_base == fields.get("assume_base", False)
    assert registration.expected_digest == fields.get("expected_digest", "").strip().lower()
    assert registration.request_id == fields.get("request_id", "")
    assert registration.labels == fields.get("labels", {})


def test_weight_of_a_part_is_1_where_it_is_left_out_and_0_where_it_is_given() -> None:
    given_parts = [adapter_pb2.AdapterPart(uri="a"), adapter_pb2.AdapterPart(uri="b", weight=0.0)]
    message = adapter_pb2.RegisterAdapterRequest(task_id="t", parts=given_parts)
    assert from_proto.registration(message).source == Parts([Part("a", 1.0), Part("b", 0.0)])


def test_an_option_has_one_name_from_the_client_to_the_store() -> None:
    sources = {adapter_pb2.RegisterAdapterRequest: {"uri", "parts"}, adapter_pb2.UploadHeader: {"files"}}
    for message, names in sources.items():
        assert set(message.DESCRIPTOR.fields_by_name) == OPTIONS | names | {"task_id"}
    assert set(RegisterOptions.__annotations__) == OPTIONS
