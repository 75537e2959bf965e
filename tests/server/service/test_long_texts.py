"""Long texts: refused before they are tokenized where they cannot fit, and held apart from everything else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
from tokenizers import pre_tokenizers

from manyhats.engine.errors import QueueFullError
from manyhats.engine.text.prompt_text import score_tokens
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.server.service.text_threads import TextThreads, slices
from manyhats.v1 import generation_pb2 as pb
from manyhats.v1 import server_pb2
from support.factories.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer
from support.fakes.server import EchoEngine, Running, refused, running_server

MIB = 1024 * 1024
TEXT = ("All that is gold does not glitter. " * 30_000)[:MIB]


def tokenizer() -> Tokenizer:
    names = ("unk_token", "bos_token", "eos_token")
    return Tokenizer(
        tiny_tokenizer(),
        special_tokens=dict(zip(names, SPECIAL_TOKENS, strict=True)),
        chat_template=CHAT_TEMPLATE,
    )


def chat(content: str) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=content)])


async def _streamed(server: Running, request: pb.GenerateRequest) -> None:
    async for _ in server.generation.GenerateStream(request):
        pass


def _scored(**prompt: str) -> Callable[[Running], Awaitable[object]]:
    return lambda server: server.generation.Score(
        pb.ScoreRequest(**prompt, continuations=[pb.Continuation(text="a")])
    )


TOO_LONG: Mapping[str, tuple[str, Callable[[Running], Awaitable[object]]]] = {
    "text": ("prompt", lambda server: server.generation.Generate(pb.GenerateRequest(text=TEXT))),
    "text, streamed": ("prompt", lambda server: _streamed(server, pb.GenerateRequest(text=TEXT))),
    "chat": ("prompt", lambda server: server.generation.Generate(pb.GenerateRequest(chat=chat(TEXT)))),
    "text to score after": ("prompt", _scored(text=TEXT)),
    "text of a continuation": (
        "continuations[1].text",
        lambda server: server.generation.Score(
            pb.ScoreRequest(
                text="p", continuations=[pb.Continuation(text="a"), pb.Continuation(text=TEXT[:-1])]
            )
        ),
    ),
}


@pytest.mark.parametrize("case", TOO_LONG)
async def test_text_that_cannot_fit_is_refused_by_its_length(case: str) -> None:
    field, send = TOO_LONG[case]
    async with running_server(tokenizer=tokenizer()) as server:
        refusal = await refused(send(server))
    assert (refusal.reason, refusal.fields) == ("PROMPT_TOO_LONG", (field,))
    assert "has at least " in refusal.message
    assert refusal.info.metadata["limit"] == "1023"
    assert server.engine.requests == []


@pytest.mark.parametrize("is_scoring", [False, True])
async def test_a_full_queue_refuses_a_text_before_it_is_tokenized(is_scoring: bool) -> None:
    class Unused(Tokenizer):
        def prompt(self, *arguments: object, **options: object) -> Any:
            raise AssertionError("it was tokenized")

    engine = EchoEngine(queue_error=QueueFullError(9, 1.5))
    names = ("unk_token", "bos_token", "eos_token")
    unused = Unused(tiny_tokenizer(), special_tokens=dict(zip(names, SPECIAL_TOKENS, strict=True)))
    async with running_server(engine=engine, tokenizer=unused) as server:
        if is_scoring:
            refusal = await refused(_scored(text="a" * 900)(server))
        else:
            refusal = await refused(server.generation.Generate(pb.GenerateRequest(text="a" * 900)))
    assert (refusal.reason, refusal.retry_s) == ("QUEUE_FULL", 1.5)


async def test_text_one_token_over_the_limit_is_refused_with_its_number_of_tokens() -> None:
    async with running_server(tokenizer=tokenizer()) as server:
        refusal = await refused(server.generation.Generate(pb.GenerateRequest(text="x" * 1024)))
        await server.generation.Generate(pb.GenerateRequest(text="x" * 1023))
    assert refusal.message == "prompt: has 1024 tokens; the limit is 1023"


@pytest.mark.parametrize("num_ids", [1024, 1_000_000])
async def test_ids_that_cannot_fit_are_refused_by_their_number(num_ids: int) -> None:
    ids = pb.TokenIds(ids=[5] * num_ids)
    async with running_server() as server:
        prompt = await refused(server.generation.Generate(pb.GenerateRequest(token_ids=ids)))
        scored = await refused(
            server.generation.Score(pb.ScoreRequest(text="p", continuations=[pb.Continuation(token_ids=ids)]))
        )
        await server.generation.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 1023)))
    assert (prompt.reason, prompt.fields) == ("PROMPT_TOO_LONG", ("prompt",))
    assert (scored.reason, scored.fields) == ("PROMPT_TOO_LONG", ("continuations[0].token_ids",))
    assert f"has {num_ids} tokens" in prompt.message


MANY: Mapping[str, pb.GenerateRequest] = {
    "chat.messages": pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage()] * 30_000)),
    "stopping.stop_sequences": pb.GenerateRequest(
        text="a", stopping=pb.StoppingParams(stop_sequences=[""] * 30_000)
    ),
    "stopping.stop_token_ids": pb.GenerateRequest(
        text="a", stopping=pb.StoppingParams(stop_token_ids=[1] * 1_000_000)
    ),
    "sampling.logit_bias": pb.GenerateRequest(
        text="a", sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(10_000), 1.0))
    ),
}


@pytest.mark.parametrize("field", MANY)
async def test_values_without_number_are_counted_and_refused(field: str) -> None:
    async with running_server() as server:
        refusal = await refused(server.generation.Generate(MANY[field]))
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))


@pytest.mark.parametrize("length", [1, 512, 513, 2048, 2049, 100_000])
async def test_tokenize_gives_all_ids_and_pieces_of_a_text_of_any_length(length: int) -> None:
    reference = tokenizer()
    text = (TEXT + "é€ <|im_end|>")[-length:]
    async with running_server(tokenizer=reference) as server:
        answer = await server.generation.Tokenize(pb.TokenizeRequest(text=text))
        in_chat = await server.generation.Tokenize(pb.TokenizeRequest(chat=chat(text)))
        from_ids = await server.generation.Tokenize(pb.TokenizeRequest(token_ids=pb.TokenIds(ids=answer.ids)))
    assert list(answer.ids) == tiny_tokenizer().encode(text).ids
    assert list(answer.pieces) == [reference.piece(token_id) for token_id in answer.ids]
    assert from_ids == answer
    assert (
        list(in_chat.ids)
        == tiny_tokenizer().encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n").ids
    )


async def test_tokenize_refuses_a_text_of_more_tokens_than_an_answer_may_have() -> None:
    async with running_server(tokenizer=tokenizer()) as server:
        refusal = await refused(server.generation.Tokenize(pb.TokenizeRequest(text="x" * 262_145)))
    assert refusal.message == "prompt: has 262145 tokens; the limit is 262144"


async def test_other_calls_are_answered_while_long_texts_are_tokenized() -> None:
    """However many come, they are tokenized one at a time; short texts do not wait for them."""
    async with running_server(tokenizer=tokenizer()) as server:
        request = pb.TokenizeRequest(text=TEXT[: MIB // 8])
        calls = [asyncio.ensure_future(server.generation.Tokenize(request)) for _ in range(4)]
        await asyncio.sleep(0)
        for text in ("short", "of several thousand characters" * 200):
            await server.generation.Tokenize(pb.TokenizeRequest(text=text))
            await server.server.GetServerInfo(server_pb2.GetServerInfoRequest())
        assert not all(call.done() for call in calls)
        answers = await asyncio.gather(*calls)
    assert {tuple(answer.ids) for answer in answers} == {tuple(answers[0].ids)}


async def test_a_text_that_cannot_fit_does_not_wait_for_those_that_are_tokenized() -> None:
    async with running_server(tokenizer=tokenizer()) as server:
        request = pb.TokenizeRequest(text=TEXT[: MIB // 8])
        calls = [asyncio.ensure_future(server.generation.Tokenize(request)) for _ in range(4)]
        await asyncio.sleep(0)
        refusal = await refused(server.generation.Generate(pb.GenerateRequest(text=TEXT)))
        assert not all(call.done() for call in calls)
        await asyncio.gather(*calls)
    assert refusal.reason == "PROMPT_TOO_LONG"


class Watched(Tokenizer):
    """Keeps where its conversations were tokenized."""

    threads: ClassVar[list[threading.Thread]] = []

    def chat_prompt(self, *args: Any, **kwargs: Any) -> Any:
        self.threads.append(threading.current_thread())
        return super().chat_prompt(*args, **kwargs)


@pytest.mark.parametrize(
    ("count", "role", "content", "is_inline"),
    [
        (1024, "r" * 64, "", False),
        (64, "r" * 64, "", False),
        (1024, "r", "", False),
        (600, "é" * 2, "", False),
        (20, "\N{TOP HAT}" * 64, "", False),
        (1, "user", "x" * 2049, False),
        (1, "user", "x" * 1900, True),
        (10, "user", "x" * 100, True),
    ],
)
async def test_conversations_of_many_or_long_roles_are_tokenized_beside_the_event_loop(
    count: int, role: str, content: str, is_inline: bool
) -> None:
    special = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    watched = Watched(tiny_tokenizer(), special_tokens=special, chat_template=CHAT_TEMPLATE)
    messages = [pb.ChatMessage(role=role, content=content)] * count
    Watched.threads.clear()
    async with running_server(tokenizer=watched) as server:
        await server.generation.Tokenize(pb.TokenizeRequest(chat=pb.ChatMessages(messages=messages)))
    (thread,) = Watched.threads
    assert (thread is threading.current_thread()) == is_inline


@pytest.mark.parametrize("is_byte_level", [True, False])
@pytest.mark.parametrize(("length", "number"), [(5, 300), (3000, 20), (30_000, 3), (1, 1)])
async def test_scored_texts_are_tokenized_in_pieces_as_they_are_one_by_one(
    is_byte_level: bool, length: int, number: int
) -> None:
    backend = tiny_tokenizer()
    if not is_byte_level:  # as it puts a space ahead of every text
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    reference = Tokenizer(backend, special_tokens={})
    texts = [TEXT[index : index + length] for index in range(number)]
    async with running_server(tokenizer=reference) as server:
        server.engine.max_context_length = 100_000
        request = pb.ScoreRequest(
            text=TEXT[:2000], continuations=[pb.Continuation(text=text) for text in texts]
        )
        await server.generation.Score(request)
        (asked,) = server.engine.score_requests
    prompt = reference.prompt(TEXT[:2000])
    expected = score_tokens(prompt.token_ids, [prompt.followed_by(text) for text in texts])
    assert asked.prompt_token_ids == expected.prompt_token_ids
    assert asked.continuations == expected.continuations
    assert tuple(asked.num_given) == expected.num_given


async def test_work_whose_caller_left_is_not_begun() -> None:
    release = asyncio.Event()
    loop = asyncio.get_running_loop()
    done: list[int] = []
    with ThreadPoolExecutor(1) as one:
        threads = TextThreads(brief=one, long=one)

        def wait() -> None:
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()

        first = asyncio.ensure_future(threads.run(wait, 10**6))
        second = asyncio.ensure_future(threads.run(lambda: done.append(2), 10**6))
        third = asyncio.ensure_future(threads.run(lambda: done.append(3), 10**6))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        release.set()
        await asyncio.gather(first, third)
    assert done == [3]


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 1024, 5000])
def test_slices_joined_are_the_whole(length: int) -> None:
    values = list(range(length))
    assert [value for part in slices(values) for value in part] == values
    assert all(len(part) <= 512 for part in slices(values))
