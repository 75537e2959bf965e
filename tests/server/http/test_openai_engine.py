"""The chat and completion routes on a real engine: whole, streamed, and what gRPC says of the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from manyhats.client import AsyncClient
from manyhats.server.lifetime.config_file import make_config
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine_server import served_ports

MESSAGES: Any = [{"role": "user", "content": "the cat and the hat"}]
SAMPLED: Any = {"model": "", "max_tokens": 12, "temperature": 1.5, "seed": 11}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openai") / "base"
    make_checkpoint(path, seed=5)
    return path


@asynccontextmanager
async def clients(base: Path, store: Path) -> AsyncIterator[tuple[openai.AsyncOpenAI, AsyncClient]]:
    config = make_config(
        {
            "model": str(base),
            "store": store,
            "dtype": "float32",
            "quantization": "none",
            "num_threads": 1,
            "max_adapters": 2,
            "kv_cache_bytes": 4 << 20,
        }
    )
    async with (
        served_ports(config) as ports,
        openai.AsyncOpenAI(base_url=f"http://{ports.http}/v1", api_key="none", max_retries=0) as http,
        AsyncClient(ports.grpc) as grpc,
    ):
        yield http, grpc


async def test_streamed_answers_concatenated_are_the_whole_ones(base: Path, tmp_path: Path) -> None:
    asked = {**SAMPLED, "n": 2, "extra_body": {"return_token_ids": True}}
    async with clients(base, tmp_path) as (http, _):
        whole: Any = await http.chat.completions.create(
            **asked, messages=MESSAGES, logprobs=True, top_logprobs=3
        )
        stream: Any = await http.chat.completions.create(
            **asked, messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True
        )
        texts, ids, tokens, reasons = ["", ""], [[], []], [[], []], ["", ""]  # type: ignore[var-annotated]
        async for chunk in stream:
            (piece,) = chunk.choices
            texts[piece.index] += piece.delta.content or ""
            ids[piece.index] += getattr(piece, "token_ids", None) or []
            tokens[piece.index] += piece.logprobs.content if piece.logprobs else []
            reasons[piece.index] += piece.finish_reason or ""
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert ids[choice.index] == choice.token_ids
        assert tokens[choice.index] == choice.logprobs.content
        assert reasons[choice.index] == choice.finish_reason
    assert ids[0] != ids[1]
    assert sum(map(len, ids)) == whole.usage.completion_tokens


async def test_streamed_completions_concatenated_are_the_whole_ones(base: Path, tmp_path: Path) -> None:
    asked = {**SAMPLED, "prompt": ["the cat", "and in"], "logprobs": 2, "echo": True}
    async with clients(base, tmp_path) as (http, _):
        whole: Any = await http.completions.create(**asked)
        stream: Any = await http.completions.create(**asked, stream=True)
        texts = ["", ""]
        lists: list[dict[str, list[Any]]] = [{}, {}]
        async for chunk in stream:
            (piece,) = chunk.choices
            texts[piece.index] += piece.text
            for name, values in piece.logprobs.model_dump().items():
                lists[piece.index].setdefault(name, []).extend(values)
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert choice.text.startswith(asked["prompt"][choice.index])
        assert lists[choice.index] == choice.logprobs.model_dump()


async def test_a_seed_repeats_an_answer_and_the_answers_of_one_call_have_seeds_in_order(
    base: Path, tmp_path: Path
) -> None:
    async with clients(base, tmp_path) as (http, _):

        async def texts(seed: int, n: int) -> list[str | None]:
            answer: Any = await http.chat.completions.create(
                **{**SAMPLED, "seed": seed}, messages=MESSAGES, n=n
            )
            return [choice.message.content for choice in answer.choices]

        several = await texts(20, 3)
        assert several == [(await texts(seed, 1))[0] for seed in (20, 21, 22)]
        assert len(set(several)) > 1


async def test_an_answer_ends_before_its_stop_sequence(base: Path, tmp_path: Path) -> None:
    async with clients(base, tmp_path) as (http, _):
        whole: Any = await http.chat.completions.create(**SAMPLED, messages=MESSAGES)
        text = whole.choices[0].message.content
        stop = text[4:6]
        stopped: Any = await http.chat.completions.create(**SAMPLED, messages=MESSAGES, stop=[stop, "zzz"])
        kept: Any = await http.chat.completions.create(
            **SAMPLED, messages=MESSAGES, stop=stop, extra_body={"include_stop_str_in_output": True}
        )
    (choice,) = stopped.choices
    assert (choice.message.content, choice.finish_reason, choice.stop_reason) == (
        text[: text.index(stop)],
        "stop",
        stop,
    )
    assert kept.choices[0].message.content == text[: text.index(stop)] + stop


async def test_greedy_tokens_have_the_largest_log_probability_of_their_place(
    base: Path, tmp_path: Path
) -> None:
    async with clients(base, tmp_path) as (http, _):
        answer: Any = await http.completions.create(
            model="", prompt="the cat", max_tokens=8, temperature=0, logprobs=3
        )
    logprobs = answer.choices[0].logprobs
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert list(top.values()) == sorted(top.values(), reverse=True)


async def test_an_echoed_prompts_log_probabilities_are_the_scores_of_grpc(base: Path, tmp_path: Path) -> None:
    async with clients(base, tmp_path) as (http, grpc):
        context: Any = (await grpc.tokenize("the cat")).ids
        behind: Any = (await grpc.tokenize(" and the hat")).ids
        answer: Any = await http.completions.create(
            model="", prompt=[*context, *behind], max_tokens=0, echo=True, logprobs=1
        )
        score = await grpc.score("the cat", [" and the hat"])
    logprobs = answer.choices[0].logprobs.token_logprobs
    assert sum(logprobs[len(context) :]) == pytest.approx(score.scores[0].logprob, abs=1e-5)


async def test_echoed_token_ids_are_their_text(base: Path, tmp_path: Path) -> None:
    async with clients(base, tmp_path) as (http, grpc):
        text = "the cat: é, €, 猫"
        ids = (await grpc.tokenize(text)).ids
        given = await http.completions.create(model="", prompt=list(ids), echo=True, max_tokens=0)
        assert text in given.choices[0].text


async def test_both_ports_generate_the_same_tokens(base: Path, tmp_path: Path) -> None:
    async with clients(base, tmp_path) as (http, grpc):
        answer: Any = await http.completions.create(
            model="", prompt="the cat", max_tokens=10, seed=3, extra_body={"return_token_ids": True}
        )
        same = await grpc.generate("the cat", max_new_tokens=10, seed=3, temperature=1.0)
    assert answer.choices[0].token_ids == [token.id for token in same.tokens]
    assert answer.choices[0].text == same.text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        same.usage.prompt_tokens,
        same.usage.generated_tokens,
    )
