"""A task's defaults: between what a caller sets and what the transport takes; bad ones are refused by name."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.errors import ArgumentInvalidError
from manyhats.adapters.registration import Registration, Uri
from manyhats.engine.request import SamplingParams, StoppingParams
from manyhats.server.service.task_defaults import Fields, TaskDefaults, read_defaults
from manyhats.v1 import adapter_pb2
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import refused, running_server

# In each: what a label may say, and what it is in a request.
SAMPLING: dict[str, st.SearchStrategy[float]] = {
    "temperature": st.floats(0, 100),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(0, 2**32 - 1),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0, 1, exclude_min=True),
    "repetition_penalty": st.floats(0, 100, exclude_min=True),
    "presence_penalty": st.floats(-100, 100),
    "frequency_penalty": st.floats(-100, 100),
    "seed": st.integers(0, 2**64 - 1),
}
samplings = st.fixed_dictionaries({}, optional=SAMPLING)


@given(samplings, samplings, samplings)
def test_a_caller_wins_over_the_task_and_the_task_over_the_transport(
    given_fields: dict[str, float], by_task: dict[str, float], otherwise: dict[str, float]
) -> None:
    defaults = read_defaults({f"default.{name}": repr(value) for name, value in by_task.items()})
    merged = Fields(given_fields, otherwise).over(defaults.sampling)
    for name in SAMPLING:
        ranked = [each[name] for each in (given_fields, by_task, otherwise) if name in each]
        assert merged.get(name) == (ranked[0] if ranked else None)
    SamplingParams(**merged)


def test_a_limit_and_stop_sequences() -> None:
    labels = {f"default.stop.{number}": text for number, text in enumerate(["\n", "b", "c"])}
    assert read_defaults({"default.max_tokens": "7", "team": "default.x", **labels}) == TaskDefaults(
        {}, {"max_new_tokens": 7, "stop_sequences": ("\n", "b", "c")}
    )
    many = {f"default.stop.{number}": str(number) for number in range(16)}
    assert read_defaults(many).stopping["stop_sequences"] == tuple(map(str, range(16)))


BAD = {
    "default.temperature": ["-1", "101", "nan", "inf", "", " 1", "1_0", "0x1", "hot", "٣", "1e999"],
    "default.top_p": ["0", "1.5"],
    "default.top_k": ["-1", "1.0", "4294967296"],
    "default.seed": ["18446744073709551616", "-1"],
    "default.max_tokens": ["0", "-1", "1.5", "", "9" * 256],
    "default.speculation.num_tokens": ["-1", "17", "1.0", ""],
    "default.speculation": ["1"],
    "default.stop.0": [""],
    "default.stop.1": ["a"],
    "default.stop.": ["a"],
    "default.stop.00": ["a"],
    "default.stop.-1": ["a"],
    "default.stop": ["a"],
    "default.": ["1"],
    "default.Temperature": ["1"],
    "default.max_new_tokens": ["1"],
    "default.logit_bias": ["{}"],
}


@pytest.mark.parametrize(("label", "value"), [(key, value) for key in BAD for value in BAD[key]])
def test_a_bad_default_is_refused_by_its_name(label: str, value: str) -> None:
    with pytest.raises(ArgumentInvalidError) as caught:
        read_defaults({"team": "a", label: value})
    assert caught.value.subject == f"labels[{label}]"


def test_more_stop_sequences_than_a_request_may_have() -> None:
    with pytest.raises(ArgumentInvalidError, match="limit is 16"):
        read_defaults({f"default.stop.{number}": "a" for number in range(17)})


async def test_bad_defaults_are_refused_however_they_come() -> None:
    labels = {"default.temperature": "hot"}
    header = adapter_pb2.UploadAdapterRequest(header=adapter_pb2.UploadHeader(task_id="hats", labels=labels))
    asked = adapter_pb2.RegisterAdapterRequest(task_id="hats", uri="a", labels=labels)
    validated = adapter_pb2.RegisterAdapterRequest(task_id="hats", uri="a", labels=labels, validate_only=True)
    async with running_server() as server:
        refusals = [
            await refused(server.adapters.RegisterAdapter(asked)),
            await refused(server.adapters.RegisterAdapter(validated)),
            await refused(server.adapters.UploadAdapter(iter([header]))),
        ]
        assert not server.store.tasks
        assert not server.store.uploads
    for refusal in refusals:
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
        assert "labels[default.temperature]: must be a number, not 'hot'" in refusal.message


LABELS = {
    "default.temperature": "0.5",
    "default.top_k": "7",
    "default.presence_penalty": "1",
    "default.max_tokens": "3",
    "default.stop.0": "\n",
}


@pytest.mark.parametrize(
    ("fields", "sampling", "stopping"),
    [
        (
            {},
            SamplingParams(temperature=0.5, top_k=7, presence_penalty=1.0),
            StoppingParams(max_new_tokens=3, stop_sequences=["\n"]),
        ),
        (
            {
                "sampling": pb.SamplingParams(temperature=0, top_k=0, presence_penalty=0, seed=5),
                "stopping": pb.StoppingParams(max_new_tokens=2, stop_sequences=["x"], time_limit_ms=500),
            },
            SamplingParams(temperature=0.0, top_k=0, presence_penalty=0.0, seed=5),
            StoppingParams(max_new_tokens=2, stop_sequences=["x"], time_limit_s=0.5),
        ),
    ],
)
async def test_requests_for_the_task_get_its_defaults_for_what_they_leave_out(
    fields: dict[str, Any], sampling: SamplingParams, stopping: StoppingParams
) -> None:
    async with running_server() as server:
        server.store.register(Registration("hats", Uri("a"), labels=LABELS))
        server.store.register(Registration("plain", Uri("b")))
        await server.generation.Generate(pb.GenerateRequest(task_id="hats", text="hello", **fields))
        await server.generation.Generate(pb.GenerateRequest(task_id="plain", text="hello"))
        await server.generation.Generate(
            pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(top_k=2))
        )
        shown = await server.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(task_id="hats"))
    ours, plain, base = server.engine.requests
    assert (ours.sampling, ours.stopping) == (sampling, stopping)
    assert (plain.sampling, plain.stopping) == (SamplingParams(), StoppingParams(max_new_tokens=256))
    assert base.sampling == SamplingParams(temperature=1.0, top_k=2)
    assert shown.adapter.labels == LABELS
