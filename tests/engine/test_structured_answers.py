"""Whatever a random model prints at temperature 1 under a schema, it fits the schema."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyhats.engine.constraint import Constraint
from manyhats.engine.engine import Engine
from manyhats.engine.errors import DeadlineExceededError, FieldInvalidError
from manyhats.engine.output import FinishReason
from manyhats.engine.request import SamplingParams, StoppingParams
from support.factories.json_schemas import Schema, json_schemas
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import Answer, collect, load_tiny, make_request, random_ids, running_engine

NUM_AT_ONCE = 25
_RANDOM = SamplingParams(temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def engine(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = load_tiny(make_checkpoint(tmp_path_factory.mktemp("structured") / "model", seed=4))
    stack = AsyncExitStack()
    made = runner.run(stack.enter_async_context(running_engine(model, max_num_sequences=NUM_AT_ONCE)))
    yield made
    runner.run(stack.aclose())


async def answers(engine: Engine, *constraints: Constraint, max_new_tokens: int = 300) -> list[Any]:
    """One answer to each, or the error."""
    stopping = StoppingParams(max_new_tokens=max_new_tokens)
    requests = (
        make_request(
            random_ids(index, 5, TINY_VOCAB_SIZE), constraint=each, stopping=stopping, sampling=_RANDOM
        )
        for index, each in enumerate(constraints)
    )
    return await asyncio.gather(*(collect(engine, each) for each in requests), return_exceptions=True)


def test_every_finished_answer_fits_its_schema(runner: asyncio.Runner, engine: Engine) -> None:
    counts = {"finished": 0, "cut": 0, "refused": 0}

    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(json_schemas(), min_size=NUM_AT_ONCE, max_size=NUM_AT_ONCE))
    def check(schemas: list[Schema]) -> None:
        constraints = [Constraint("json_schema", json.dumps(schema)) for schema in schemas]
        for schema, answer in zip(schemas, runner.run(answers(engine, *constraints)), strict=True):
            if isinstance(answer, FieldInvalidError):
                counts["refused"] += 1
                continue
            assert isinstance(answer, Answer), answer
            if answer.finish_reason is FinishReason.LENGTH:
                counts["cut"] += 1
                continue
            counts["finished"] += 1
            jsonschema.Draft202012Validator(
                schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            ).validate(json.loads(answer.text))

    check()
    assert counts["finished"] >= 450, counts
    assert counts["refused"] <= 25, counts


SLOW = Constraint("json_schema", '{"type": "integer", "multipleOf": 999983}')
"""It takes a second, and is then refused."""


def test_a_request_waits_for_its_constraint_no_longer_than_its_deadline(
    runner: asyncio.Runner, engine: Engine
) -> None:
    async def check() -> None:
        begin_s = time.monotonic()
        late = make_request([5, 6], constraint=SLOW, deadline_s=begin_s + 0.05)
        with pytest.raises(DeadlineExceededError, match="waiting for the constraint"):
            await collect(engine, late)
        assert engine.stats.num_waiting == 0
        with pytest.raises(FieldInvalidError, match="processor time"):
            await collect(engine, make_request([5, 6], constraint=SLOW))

    runner.run(check())


async def test_an_engine_that_stops_lets_waiting_requests_finish(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=4))
    async with running_engine(model) as engine:
        request = make_request([5, 6], constraint=Constraint("choice", ("yes", "no")))
        answer = asyncio.create_task(collect(engine, request))
        await asyncio.sleep(0)
        assert engine.stats.num_waiting == 1
        await engine.stop(drain_s=60.0)
        assert (await answer).text in ("yes", "no")
