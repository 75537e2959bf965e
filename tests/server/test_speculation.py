"""Guessing ahead, on both ports: on by request or by a task's default, the same answers, and what is said of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from manyhats.adapters.registration import Registration, Uri
from manyhats.engine.request import SpeculationParams
from manyhats.v1 import generation_pb2 as pb
from support.factories.saying_model import make_saying_checkpoint
from support.fakes.server import running_server
from support.harnesses.engine import load_tiny
from support.harnesses.engine_server import Served, served_engine
from support.harnesses.http import exchange, request

pytestmark = pytest.mark.asyncio(loop_scope="module")
SAID = list(range(40, 52))
EIGHT = pb.Speculation(num_tokens=8)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    directory = make_saying_checkpoint(tmp_path_factory.mktemp("guessed") / "model", SAID)
    async with served_engine(load_tiny(directory)) as served:
        yield served


def message(**fields: Any) -> pb.GenerateRequest:
    stopping = pb.StoppingParams(max_new_tokens=60)
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=SAID),
        stopping=stopping,
        response=pb.ResponseOptions(logprobs=True),
        **fields,
    )


async def test_grpc_says_the_same_in_fewer_pieces(real: Served) -> None:
    plain = await real.generation.Generate(message())
    guessed = await real.generation.Generate(message(speculation=EIGHT))
    assert guessed.tokens == plain.tokens
    assert (guessed.text, guessed.finish_reason) == (plain.text, plain.finish_reason)
    assert (plain.usage.draft_tokens, plain.usage.accepted_draft_tokens) == (0, 0)
    assert 40 < guessed.usage.accepted_draft_tokens <= guessed.usage.draft_tokens
    assert guessed.usage.generated_tokens == 60
    pieces = [piece async for piece in real.generation.GenerateStream(message(speculation=EIGHT))]
    assert [token for piece in pieces for token in piece.tokens] == list(plain.tokens)
    assert "".join(piece.text for piece in pieces) == plain.text
    # A reader that falls behind gets what several steps brought as one piece.
    assert len(pieces) <= 60 - guessed.usage.accepted_draft_tokens
    assert pieces[-1].usage.accepted_draft_tokens == guessed.usage.accepted_draft_tokens


async def test_metrics_count_what_was_guessed_and_came(real: Served) -> None:
    def counted() -> list[float]:
        value = real.metrics.registry.get_sample_value
        names = ("manyhats_draft_tokens_total", "manyhats_accepted_draft_tokens_total")
        return [value(name, {"task": "_base"}) or 0.0 for name in names]

    before = counted()
    await real.generation.Generate(message())
    assert counted() == before
    usages = [(await real.generation.Generate(message(speculation=EIGHT))).usage for _ in range(2)]
    after = counted()
    assert after[0] - before[0] == sum(usage.draft_tokens for usage in usages)
    assert after[1] - before[1] == sum(usage.accepted_draft_tokens for usage in usages)


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": SAID, "max_tokens": 60, "logprobs": 1}),
    ("/v1/completions", {"prompt": SAID, "max_tokens": 60, "n": 3, "temperature": 0.1, "seed": 1}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 60,
            "temperature": 0,
            "logprobs": True,
        },
    ),
    ("/v1/responses", {"input": "a", "max_output_tokens": 60, "temperature": 0}),
]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[path for path, _ in BODIES])
async def test_http_says_the_same(real: Served, path: str, body: dict[str, Any]) -> None:
    plain, off, guessed = [
        (await exchange(real.http, request(path, {**body, **more}), timeout_s=60)).json
        for more in ({}, {"speculation": {"num_tokens": 0}}, {"speculation": {"num_tokens": 8}})
    ]
    said = "output" if path == "/v1/responses" else "choices"
    for each in (plain, off, guessed):
        for item in each[said]:
            item.pop("id", None)
    assert guessed[said] == plain[said] == off[said]
    if path == "/v1/responses":
        return
    assert "completion_tokens_details" not in plain["usage"]
    details = guessed["usage"].pop("completion_tokens_details")
    assert set(details) == {"accepted_prediction_tokens", "rejected_prediction_tokens"}
    assert details["accepted_prediction_tokens"] > 30 * len(guessed["choices"])
    assert guessed["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("label", "given", "expected"),
    [("5", None, 5), ("5", 0, 0), ("5", 3, 3), ("0", None, 0), (None, None, 0), (None, 16, 16)],
)
async def test_a_task_decides_for_callers_that_do_not(
    label: str | None, given: int | None, expected: int
) -> None:
    async with running_server() as server:
        labels = {} if label is None else {"default.speculation.num_tokens": label}
        server.store.register(Registration("hats", Uri("a"), labels=labels))
        speculation = None if given is None else pb.Speculation(num_tokens=given)
        await server.generation.Generate(
            pb.GenerateRequest(task_id="hats", text="hello", speculation=speculation)
        )
        more = {} if given is None else {"speculation": {"num_tokens": given}}
        for path, body in (
            ("/v1/completions", {"prompt": "hello"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/responses", {"input": "a"}),
        ):
            reply = await exchange(server.http, request(path, {"model": "hats", **body, **more}))
            assert reply.status == 200
        found = [asked.speculation for asked in server.engine.requests]
    assert found == [SpeculationParams(num_tokens=expected)] * 4
