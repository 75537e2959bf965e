"""Constraints through the port: one answer each, and refusals that name their field."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import pytest

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.v1 import generation_pb2 as pb
from support.factories.tiny_models import make_checkpoint
from support.fakes.server import refused
from support.harnesses.engine import load_tiny
from support.harnesses.engine_server import Served, served_engine

SCHEMA = '{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": false}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("constraints") / "model", seed=13))


@pytest.fixture
async def served(model: LoadedModel) -> AsyncIterator[Served]:
    async with served_engine(model) as made:
        yield made


def asked(**constraint: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="hats",
        sampling=pb.SamplingParams(temperature=1.0, seed=5),
        stopping=pb.StoppingParams(max_new_tokens=120),
        **constraint,  # type: ignore[arg-type]
    )


async def test_each_kind_of_constraint_is_kept_to(served: Served) -> None:
    choice = await served.generation.Generate(asked(choice=pb.Choice(options=["yes", "no"]), num_sequences=3))
    assert {choice.text, *(each.text for each in choice.more_sequences)} <= {"yes", "no"}
    assert choice.finish_reason == pb.FINISH_REASON_EOS
    expression = await served.generation.Generate(asked(regex="[a-c]{2}-[0-9]"))
    assert re.fullmatch("[a-c]{2}-[0-9]", expression.text)
    grammar = await served.generation.Generate(asked(grammar='start: "a" b+\nb: "x" | "y" "."'))
    assert re.fullmatch(r"a(x|y\.)*", grammar.text)
    pieces = [piece async for piece in served.generation.GenerateStream(asked(json_schema=SCHEMA))]
    assert json.loads("".join(piece.text for piece in pieces)) in ({"n": 1}, {"n": 2})
    assert pieces[-1].finish_reason == pb.FINISH_REASON_EOS


@pytest.mark.parametrize(
    ("constraint", "problem"),
    [
        ({"json_schema": "{"}, "is not JSON"),
        ({"json_schema": '{"uniqueItems": true}'}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"json_schema": '{"$ref": "file:///etc/passwd"}'}, "must stay within the schema"),
        ({"regex": "a("}, "unclosed group"),
        ({"regex": ""}, "must not be empty"),
        ({"grammar": "start: x"}, "x"),
        ({"choice": pb.Choice()}, "must be 1 to 1024 texts, not 0"),
        ({"choice": pb.Choice(options=["a", ""])}, "must not be empty"),
    ],
)
async def test_refusals_name_their_field(served: Served, constraint: dict[str, object], problem: str) -> None:
    refusal = await refused(served.generation.Generate(asked(**constraint)))
    (field,) = constraint
    assert refusal.reason == "FIELD_INVALID"
    assert list(refusal.fields) == [field]
    assert problem in refusal.message


async def test_streams_go_on_while_hostile_constraints_compile(served: Served) -> None:
    """Each takes a second of processor time, and is then refused."""
    request = asked()
    request.stopping.CopyFrom(pb.StoppingParams(max_new_tokens=400, ignore_eos=True))
    stream = served.generation.GenerateStream(request)
    num_tokens = 0

    async def read() -> None:
        nonlocal num_tokens
        async for piece in stream:
            num_tokens += len(piece.tokens)
            await asyncio.sleep(0.002)

    reading = asyncio.create_task(read())
    hostile = [
        refused(served.generation.Generate(asked(json_schema=schema)))
        for schema in (
            '{"type": "integer", "multipleOf": 999983}',
            '{"type": "integer", "multipleOf": 999979}',
        )
    ]
    before = num_tokens
    refusals = await asyncio.gather(*hostile)
    assert num_tokens - before > 50 or reading.done()
    assert all("1 s of processor time" in refusal.message for refusal in refusals)
    await reading
    assert num_tokens == 400
