"""Tasks whose embedding and head were resized, to more tokens than the base has or fewer, against PEFT."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from torch import Tensor

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.request import ResponseOptions, SamplingParams, ScoreRequest, StoppingParams
from support.factories.adapters import make_ia3
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import Answer, collect, load_tiny, make_request, random_ids, running_engine
from support.oracles.peft import make_peft, save_peft
from support.oracles.transformers import load_transformers

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

V = TINY_VOCAB_SIZE
TOLERANCE = 1e-4
RESPONSE = ResponseOptions(logprobs=True, top_logprobs=40, prompt_logprobs=True)
ADDED = [V, V + 1, V + 2]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "c_attn"], **fields)


TASKS: Mapping[str, tuple[int, Any]] = {
    "added-whole": (V + 3, lambda ends: lora(modules_to_save=ends)),
    "added-auto": (V + 5, lambda _: lora()),
    "added-rows": (V + 3, lambda _: lora(trainable_token_indices=[7, *ADDED])),
    "fewer-whole": (V - 37, lambda ends: lora(modules_to_save=ends)),
    "fewer-auto": (V - 3, lambda _: lora()),
}
"""Task → its vocabulary, and PEFT's config, by the names of embedding and head."""
TIED_ONLY: Mapping[str, tuple[int, Any]] = {
    "added-alone": (V + 3, lambda _: TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[7, *ADDED])),
    "added-tied": (V + 3, lambda ends: lora(modules_to_save=ends[:1], ensure_weight_tying=True)),
    "added-tied-head": (V + 3, lambda ends: lora(modules_to_save=ends[1:], ensure_weight_tying=True)),
    "added-tied-whole": (V + 3, lambda ends: lora(modules_to_save=ends, ensure_weight_tying=True)),
    "added-embedding": (V + 3, lambda ends: lora(modules_to_save=ends[:1])),
    "added-head": (V + 3, lambda ends: lora(modules_to_save=ends[1:])),
    "tied": (V, lambda ends: lora(modules_to_save=ends[:1], ensure_weight_tying=True)),
    "tied-head": (V, lambda ends: lora(modules_to_save=ends[1:], ensure_weight_tying=True)),
}
FAMILIES = {"llama": False, "gemma2": True, "granite": True, "phi": False, "gpt2": True}
"""Family → whether its head is its embedding.

A plain one, one with a cap, a multiplier and a divisor, a bias, and a name that PEFT does not keep tied.
"""


@dataclass(frozen=True, slots=True)
class Home:
    """A base and its tasks: where they lie, their vocabularies, and the logits [T, n] that PEFT has for a prompt."""

    root: Path
    checkpoint: Path
    sizes: Mapping[str, int]
    prompts: Mapping[str, list[int]]
    expected: Mapping[str, Tensor]


def save_resized(checkpoint: Path, directory: Path, size: int, config: Any) -> Any:
    """Train, so to speak, on a base with another number of tokens, and save as PEFT does by itself."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = load_transformers(checkpoint)
        model.resize_token_embeddings(size)
        config.base_model_name_or_path = str(checkpoint)  # by which PEFT sees that it was resized
        peft = make_peft(model, config)
        save_peft(peft, directory)
    return peft


@pytest.fixture(scope="module", params=FAMILIES)
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("own")
    is_tied = FAMILIES[request.param]
    ends = ["wte" if request.param == "gpt2" else "embed_tokens", "lm_head"]
    heads = {"kv_heads": 4} if request.param in ("phi", "gpt2") else {}
    checkpoint = make_checkpoint(root / "model", request.param, seed=8, tie=is_tied, **heads)
    tasks = TASKS | (TIED_ONLY if is_tied else {})
    if request.param == "phi":  # rows of a head with a bias are refused
        tasks = {name: task for name, task in tasks.items() if not name.endswith("rows")}
    prompts: dict[str, list[int]] = {}
    expected: dict[str, Tensor] = {}
    for name, (size, make_config) in tasks.items():
        peft = save_resized(checkpoint, root / name, size, make_config(ends))
        prompts[name] = [*random_ids(2, 20, min(size, V)), *range(max(7, size - 3), size), 7, 5]
        with torch.no_grad():
            expected[name] = peft(input_ids=torch.tensor([prompts[name]])).logits[0]
    sizes = {name: size for name, (size, _) in tasks.items()}
    return Home(root, checkpoint, sizes, prompts, expected)


@pytest.fixture
def store(home: Home, tmp_path: Path) -> Iterator[AdapterStore]:
    model = load_tiny(home.checkpoint)
    with closing(open_store(tmp_path / "store", model.description, [home.root])) as store:
        for name in home.sizes:
            store.register(Registration(name, Uri(str(home.root / name))))
        yield store


def record_of(store: AdapterStore, task: str) -> AdapterRecord:
    return store.resolve(task)


async def test_log_probabilities_are_peft_s(home: Home, store: AdapterStore) -> None:
    async with running_engine(load_tiny(home.checkpoint), store.lower, max_num_batched_tokens=48) as engine:
        answers: list[Answer] = await asyncio.gather(
            *(
                collect(
                    engine,
                    make_request(home.prompts[task], record_of(store, task), new_tokens=1, response=RESPONSE),
                )
                for task in home.sizes
            )
        )
    for task, answer in zip(home.sizes, answers, strict=True):
        expected = home.expected[task].double().log_softmax(-1)
        assert expected.shape[1] == home.sizes[task]
        for position, token in enumerate((*answer.prompt_tokens[1:], answer.tokens[0])):
            assert token.logprob == pytest.approx(float(expected[position, token.id]), abs=TOLERANCE), task
            best = torch.tensor([top.logprob for top in token.top], dtype=torch.float64)
            wanted = expected[position].topk(len(best)).values
            torch.testing.assert_close(best, wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.bits
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_rows_of_all_vocabularies_in_one_batch_are_each_as_alone(
    home: Home, store: AdapterStore, dtype: str
) -> None:
    """Sampled, with penalties, biases and counts of the most likely that reach beyond the base's tokens."""
    requests = []
    for index, task in enumerate((*home.sizes, None, *home.sizes, None)):
        size = home.sizes[task] if task else V
        sampling = SamplingParams(
            temperature=(0.0, 1.3)[index % 2],
            top_k=(0, size)[index % 3 == 1],
            top_p=(1.0, 0.9)[index % 3 == 2],
            seed=index,
            repetition_penalty=1.2,
            logit_bias={size - 1: 12.0, 4: -2.0},
        )
        prompt = home.prompts[task] if task else random_ids(9, 12, V)
        record = record_of(store, task) if task else None
        requests.append(make_request(prompt, record, new_tokens=12, sampling=sampling, response=RESPONSE))
    model = load_tiny(home.checkpoint)
    async with running_engine(model, store.lower, dtype=dtype, max_num_sequences=32) as engine:
        together = await asyncio.gather(*(collect(engine, request) for request in requests))
    async with running_engine(model, store.lower, dtype=dtype, max_num_batched_tokens=32) as engine:
        alone = [await collect(engine, request) for request in requests]
    for request, mixed, single in zip(requests, together, alone, strict=True):
        assert mixed.tokens == single.tokens, request.adapter
        assert mixed.prompt_tokens == single.prompt_tokens
    assert any(token >= V for answer in together for token in answer.token_ids)


async def test_each_task_has_its_own_tokens_only(home: Home, store: AdapterStore) -> None:
    async with running_engine(load_tiny(home.checkpoint), store.lower) as engine:
        for task, size in {**home.sizes, None: V}.items():
            record = record_of(store, task) if task else None
            sampling = SamplingParams(logit_bias={size - 1: 100.0}, temperature=0.0)
            answer = await collect(
                engine, make_request([5, size - 1], record, new_tokens=2, sampling=sampling)
            )
            assert answer.token_ids == [size - 1, size - 1]
            scored = await engine.score(
                ScoreRequest(id="s", prompt_token_ids=(5,), continuations=((size - 1,), (4,)), adapter=record)
            )
            assert len(scored.scores) == 2
            for request in (
                make_request([5, size], record),
                make_request([5], record, sampling=SamplingParams(logit_bias={size: 1.0})),
                make_request([5], record, stopping=StoppingParams(max_new_tokens=2, stop_token_ids=(size,))),
            ):
                with pytest.raises(FieldInvalidError, match=f"outside the vocabulary of {size}"):
                    await collect(engine, request)
            with pytest.raises(FieldInvalidError, match=f"outside the vocabulary of {size}"):
                await engine.score(
                    ScoreRequest(id="s", prompt_token_ids=(5,), continuations=((size,),), adapter=record)
                )


async def test_constraints_hold_in_any_vocabulary(home: Home, store: AdapterStore) -> None:
    async with running_engine(load_tiny(home.checkpoint), store.lower) as engine:
        requests = [
            make_request(
                [5, 6],
                record_of(store, task) if task else None,
                constraint=Constraint("choice", ("ab", "cd")),
                stopping=StoppingParams(max_new_tokens=8),
            )
            for task in (*home.sizes, None)
        ]
        answers = await asyncio.gather(*(collect(engine, request) for request in requests))
    assert {answer.text for answer in answers} <= {"ab", "cd"}


async def test_a_composition_has_the_vocabulary_of_its_part(home: Home, store: AdapterStore) -> None:
    def parts(*names: str) -> Parts:
        return Parts(tuple(Part(str(home.root / name)) for name in names))

    base = load_tiny(home.checkpoint)
    make_ia3(home.root / "ia3", base.description, sites=["down_proj"])
    record = store.register(Registration("composed", parts("added-auto", "ia3"))).record
    assert store.lower(record).vocab_size == V + 5
    async with running_engine(base, store.lower) as engine:
        sampling = SamplingParams(logit_bias={V + 4: 100.0}, temperature=0.0)
        answer = await collect(engine, make_request([5, V + 4], record, new_tokens=2, sampling=sampling))
    assert answer.token_ids == [V + 4] * 2
    with pytest.raises(AdapterUnsupportedError, match=r"parts\[1\]"):
        store.register(Registration("two", parts("added-auto", "fewer-auto")))


REFUSED: Mapping[str, tuple[bool, Any, str]] = {
    "no head": (
        False,
        lambda: TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=ADDED),
        r"embed_tokens\S*: makes a vocabulary of 323 tokens, and lm_head has 320 rows; .* must hold both",
    ),
    "adapted": (
        False,
        lambda: LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]),
        "not where the method adapts it",
    ),
}


@pytest.mark.parametrize(("tie", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_tables_of_which_rows_are_missing_are_refused(
    tie: bool, config: Any, message: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", seed=8, tie=tie)
    save_resized(checkpoint, tmp_path / "task", V + 3, config())
    model = load_tiny(checkpoint)
    with (
        closing(open_store(tmp_path / "store", model.description, [tmp_path])) as store,
        pytest.raises((AdapterInvalidError, AdapterUnsupportedError), match=message),
    ):
        store.register(Registration("task", Uri(str(tmp_path / "task"))))
