"""GenerationService over a real port: answers, streams, fields, cancellation."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from manyhats.adapters.registration import Registration, Uri
from manyhats.engine.errors import NumericalError
from manyhats.engine.request import ResponseOptions, SamplingParams, StoppingParams
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import BOS, eventually, refusal_of, refused, running_server


async def test_generate_echoes_text_tokens_usage_and_request_id() -> None:
    async with running_server() as server:
        answer = await server.generation.Generate(pb.GenerateRequest(request_id="mine", text="hat"))
    assert (answer.request_id, answer.text) == ("mine", "hat")
    assert [token.id for token in answer.tokens] == [BOS, *(byte + 2 for byte in b"hat")]
    assert answer.finish_reason == pb.FINISH_REASON_LENGTH
    assert (answer.usage.prompt_tokens, answer.usage.generated_tokens) == (4, 4)
    assert (answer.usage.queue_ms, answer.usage.prefill_ms) == (1.0, 2.0)
    assert answer.usage.decode_ms == pytest.approx(9.0)
    assert not answer.HasField("adapter")
    assert not answer.tokens[0].HasField("logprob")


async def test_server_makes_a_request_id_where_there_is_none() -> None:
    async with running_server() as server:
        answers = [await server.generation.Generate(pb.GenerateRequest(text="a")) for _ in range(2)]
    assert answers[0].request_id
    assert answers[0].request_id != answers[1].request_id


async def test_the_same_request_id_in_flight_twice_is_two_requests() -> None:
    async with running_server() as server:
        server.engine.step_s = 0.01
        request = pb.GenerateRequest(request_id="same", text="ab")
        answers = await asyncio.gather(*(server.generation.Generate(request) for _ in range(3)))
    assert [(answer.request_id, answer.text) for answer in answers] == [("same", "ab")] * 3
    assert len({request.id for request in server.engine.requests}) == 3


async def test_stream_concatenated_equals_the_unary_answer() -> None:
    async with running_server() as server:
        server.store.register(Registration("hats", Uri("a")))
        request = pb.GenerateRequest(
            request_id="r",
            task_id="hats",
            text="grüße",
            response=pb.ResponseOptions(logprobs=True, prompt_logprobs=True),
        )
        whole = await server.generation.Generate(request)
        pieces = [piece async for piece in server.generation.GenerateStream(request)]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.tokens] == list(whole.tokens)
    assert [token for piece in pieces for token in piece.prompt_tokens] == list(whole.prompt_tokens)
    assert pieces[-1].finish_reason == whole.finish_reason
    assert pieces[-1].usage == whole.usage
    assert pieces[0].adapter == whole.adapter


async def test_stream_tells_adapter_first_and_end_last() -> None:
    async with running_server() as server:
        server.store.register(Registration("hats", Uri("a")))
        request = pb.GenerateRequest(task_id="hats@1", text="hat")
        pieces = [piece async for piece in server.generation.GenerateStream(request)]
    first, *middle, last = pieces
    assert (first.adapter.task_id, first.adapter.version, first.adapter.digest) == ("hats", 1, "sha256:a")
    assert (first.usage.prompt_tokens, first.usage.cached_prompt_tokens) == (4, 1)
    assert (first.usage.generated_tokens, first.usage.decode_ms) == (0, 0.0)
    assert not any(piece.HasField("adapter") for piece in (*middle, last))
    assert not any(piece.HasField("usage") for piece in middle)
    assert {piece.finish_reason for piece in (first, *middle)} == {pb.FINISH_REASON_UNSPECIFIED}
    assert (last.finish_reason, last.usage.generated_tokens) == (pb.FINISH_REASON_LENGTH, 4)
    assert len({piece.request_id for piece in pieces}) == 1


async def test_stream_of_one_token_is_first_and_last_at_once() -> None:
    async with running_server() as server:
        server.store.register(Registration("hats", Uri("a")))
        request = pb.GenerateRequest(task_id="hats", text="hat", stopping=pb.StoppingParams(max_new_tokens=1))
        (only,) = [piece async for piece in server.generation.GenerateStream(request)]
    assert only.adapter.task_id == "hats"
    assert only.usage.generated_tokens == 1
    assert only.finish_reason == pb.FINISH_REASON_LENGTH


async def test_prompts_as_token_ids_and_chat() -> None:
    async with running_server() as server:
        by_ids = await server.generation.Generate(
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[ord("h") + 2, ord("i") + 2]))
        )
        chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
        by_chat = await server.generation.Generate(pb.GenerateRequest(chat=chat))
        bare = await server.generation.Generate(pb.GenerateRequest(text="hi", add_special_tokens=False))
    assert by_ids.text == "hi"
    assert by_chat.text == "user:hi;"
    assert [token.id for token in bare.tokens] == [ord("h") + 2, ord("i") + 2]


async def test_long_text_takes_the_same_way() -> None:
    async with running_server() as server:
        server.engine.max_context_length = 8192
        answer = await server.generation.Generate(pb.GenerateRequest(text="x" * 5000))
    assert answer.text == "x" * 255
    assert answer.usage.prompt_tokens == 5001


async def test_unset_fields_have_the_documented_defaults() -> None:
    async with running_server() as server:
        await server.generation.Generate(pb.GenerateRequest(text="a"))
        await server.generation.Generate(pb.GenerateRequest(text="a", sampling=pb.SamplingParams()))
    greedy, sampled = server.engine.requests
    assert greedy.sampling == SamplingParams()
    assert sampled.sampling == SamplingParams(temperature=1.0)
    assert greedy.stopping == StoppingParams(max_new_tokens=256)
    assert greedy.response == ResponseOptions()
    assert (greedy.adapter, greedy.deadline_s, greedy.priority, greedy.cache_salt) == (None, None, 0, "")


async def test_every_field_reaches_the_engine() -> None:
    request = pb.GenerateRequest(
        text="abc",
        sampling=pb.SamplingParams(
            temperature=0.7,
            top_k=5,
            top_p=0.9,
            min_p=0.1,
            typical_p=0.8,
            repetition_penalty=1.2,
            presence_penalty=0.3,
            frequency_penalty=-0.4,
            seed=2**64 - 1,
            logit_bias={7: -2.0},
        ),
        stopping=pb.StoppingParams(
            max_new_tokens=3,
            min_new_tokens=2,
            stop_sequences=["x", "yz"],
            include_stop_sequence=True,
            ignore_eos=True,
            time_limit_ms=1500,
            stop_token_ids=[9],
        ),
        response=pb.ResponseOptions(logprobs=True, top_logprobs=4, prompt_logprobs=True),
        cache_salt="salt",
        priority=-3,
    )
    async with running_server() as server:
        await server.generation.Generate(request)
    (asked,) = server.engine.requests
    assert asked.sampling == SamplingParams(
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=-0.4,
        seed=2**64 - 1,
        logit_bias={7: -2.0},
    )
    assert asked.stopping == StoppingParams(
        max_new_tokens=3,
        min_new_tokens=2,
        stop_sequences=("x", "yz"),
        include_stop_sequence=True,
        ignore_eos=True,
        time_limit_s=1.5,
        stop_token_ids=(9,),
    )
    assert asked.response == ResponseOptions(logprobs=True, top_logprobs=4, prompt_logprobs=True)
    assert (asked.cache_salt, asked.priority) == ("salt", -3)


async def test_deadline_of_the_call_reaches_the_engine() -> None:
    async with running_server() as server:
        before_s = time.monotonic()
        await server.generation.Generate(pb.GenerateRequest(text="a"), timeout=20)
        await server.generation.Score(
            pb.ScoreRequest(text="a", continuations=[pb.Continuation(text="b")]), timeout=20
        )
    (generation,), (scoring,) = server.engine.requests, server.engine.score_requests
    for deadline_s in (generation.deadline_s, scoring.deadline_s):
        assert deadline_s is not None
        assert 10 < deadline_s - before_s < 30
    assert before_s <= generation.accepted_s <= scoring.accepted_s


async def test_past_deadline_closes_the_engines_generator() -> None:
    async with running_server() as server:
        server.engine.step_s = 30
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.generation.Generate(pb.GenerateRequest(text="a"), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: len(server.engine.closed) == 1)


async def test_cancelled_unary_call_closes_the_engines_generator() -> None:
    async with running_server() as server:
        server.engine.step_s = 30
        call = server.generation.Generate(pb.GenerateRequest(text="a"))
        await eventually(lambda: server.engine.running == 1)
        call.cancel()
        await eventually(lambda: len(server.engine.closed) == 1)
        assert server.gate.num_running == 0


async def test_cancelled_stream_closes_the_engines_generator_and_leaves_others_alone() -> None:
    async with running_server() as server:
        server.engine.step_s = 0.01
        other = asyncio.create_task(
            _text_of(server.generation.GenerateStream(pb.GenerateRequest(text="other")))
        )
        call = server.generation.GenerateStream(pb.GenerateRequest(text="x" * 250))
        assert await call.read()
        call.cancel()
        await eventually(lambda: len(server.engine.closed) >= 1)
        assert await other == "other"
        await eventually(lambda: server.engine.running == 0)


async def test_vanished_client_closes_the_engines_generator() -> None:
    async with running_server() as server:
        server.engine.step_s = 0.01
        channel = grpc.aio.insecure_channel(server.port.address)
        stub = type(server.generation)(channel)
        call = stub.GenerateStream(pb.GenerateRequest(text="x" * 250))
        assert await call.read()
        await channel.close()
        await eventually(lambda: server.engine.running == 0)
        assert len(server.engine.closed) == 1


async def test_fault_in_the_middle_of_a_stream_is_a_status() -> None:
    async with running_server() as server:
        server.engine.error, server.engine.error_after = NumericalError("the logits were not finite"), 2
        call = server.generation.GenerateStream(pb.GenerateRequest(text="abcd"))
        pieces = aiter(call)
        for _ in range(2):
            await anext(pieces)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(pieces)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "NUMERICAL_ERROR")


async def test_score_gives_one_score_per_continuation_in_order() -> None:
    async with running_server() as server:
        server.store.register(Registration("hats", Uri("a")))
        answer = await server.generation.Score(
            pb.ScoreRequest(
                request_id="s",
                task_id="hats",
                text="p",
                continuations=[
                    pb.Continuation(text="abc"),
                    pb.Continuation(token_ids=pb.TokenIds(ids=[5])),
                ],
            )
        )
    (asked,) = server.engine.score_requests
    # A continuation's text is tokenized by itself, without special tokens.
    assert asked.continuations == (tuple(byte + 2 for byte in b"abc"), (5,))
    assert asked.prompt_token_ids == (BOS, ord("p") + 2)
    assert [(score.logprob, score.num_tokens) for score in answer.scores] == [(-3.0, 3), (-1.0, 1)]
    assert answer.scores[1].tokens[0].rank == 1
    assert (answer.request_id, answer.adapter.task_id, answer.usage.prompt_tokens) == ("s", "hats", 2)


async def test_many_continuations_are_tokenized_together() -> None:
    texts = [f"{'x' * 20}{index}" for index in range(1024)]
    async with running_server() as server:
        request = pb.ScoreRequest(text="p", continuations=[pb.Continuation(text=text) for text in texts])
        answer = await server.generation.Score(request)
    assert [score.num_tokens for score in answer.scores] == [len(text) for text in texts]


async def test_tokenize_gives_ids_and_pieces() -> None:
    async with running_server() as server:
        answer = await server.generation.Tokenize(pb.TokenizeRequest(text="hi"))
        bare = await server.generation.Tokenize(pb.TokenizeRequest(text="hi", add_special_tokens=False))
        refusal = await refused(server.generation.Tokenize(pb.TokenizeRequest(task_id="no", text="hi")))
    assert (list(answer.ids), list(answer.pieces)) == ([BOS, 106, 107], ["", "h", "i"])
    assert list(bare.ids) == [106, 107]
    assert refusal.reason == "TASK_NOT_FOUND"


async def _text_of(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateStreamResponse]) -> str:
    return "".join([piece.text async for piece in call])
