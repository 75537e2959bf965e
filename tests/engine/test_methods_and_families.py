"""Every method of PEFT on every family, through registration and the engine, against PEFT's own logits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from torch import Tensor

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.engine.request import ResponseOptions
from support.factories.tiny_models import TINY_VOCAB_SIZE, linears_of, make_checkpoint
from support.harnesses.engine import Answer, collect, load_tiny, make_request, random_ids, running_engine
from support.oracles.peft import make_peft, save_peft
from support.oracles.transformers import load_transformers

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
IDS = random_ids(2, 37, TINY_VOCAB_SIZE)
NUM_VIRTUAL = 7
WINDOW = {"sliding_window": 20}
"""Shorter than the prompt."""
ALL_HEADS = {"kv_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": WINDOW,
    "qwen3": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "phi3": {**WINDOW, "hidden_size": 128},
    "granite": {},
    "olmo2": {},
    "smollm3": {**WINDOW, "num_layers": 3},
    "gemma": {},
    "gpt2": ALL_HEADS,
    "gptj": ALL_HEADS,
    "starcoder2": WINDOW,
    "gpt_neox": ALL_HEADS,
    "opt": ALL_HEADS,
    "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32, **ALL_HEADS},
    "phi": {},
    "falcon": {"multi_query": False, "num_kv_heads": 4, **ALL_HEADS},
    "cohere": {"use_qk_norm": True},
    "cohere2": WINDOW,
    "mixtral": {},
    "qwen3_moe": WINDOW,
}
METHODS: Mapping[AdapterMethod, Callable[[list[str]], Any]] = {
    AdapterMethod.LORA: lambda linears: LoraConfig(r=5, lora_alpha=8, target_modules=linears),
    AdapterMethod.DORA: lambda linears: LoraConfig(r=3, use_dora=True, target_modules=linears),
    AdapterMethod.ADALORA: lambda linears: AdaLoraConfig(init_r=4, total_step=9, target_modules=linears),
    AdapterMethod.VERA: lambda linears: VeraConfig(r=16, target_modules=linears),
    AdapterMethod.IA3: lambda linears: IA3Config(
        target_modules=linears, feedforward_modules=linears[-1:], init_ia3_weights=True
    ),
    AdapterMethod.PREFIX_TUNING: lambda linears: PrefixTuningConfig(num_virtual_tokens=NUM_VIRTUAL),
    AdapterMethod.PROMPT_TUNING: lambda linears: PromptTuningConfig(num_virtual_tokens=NUM_VIRTUAL),
    AdapterMethod.P_TUNING: lambda linears: PromptEncoderConfig(
        num_virtual_tokens=NUM_VIRTUAL, encoder_hidden_size=24
    ),
    AdapterMethod.MULTITASK_PROMPT_TUNING: lambda linears: MultitaskPromptTuningConfig(
        num_virtual_tokens=NUM_VIRTUAL, num_ranks=3
    ),
    AdapterMethod.TRAINABLE_TOKENS: lambda linears: TrainableTokensConfig(
        token_indices=sorted(set(IDS[3:30:4]))
    ),
}
Found = Mapping[AdapterMethod | None, tuple[Answer, Tensor]]
"""By method, or of the base: what the engine answered, and the logits of PEFT, [T, V]."""


@torch.no_grad()
def logits_of(model: Any, **fields: Any) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([IDS]), **fields).logits[0, -len(IDS) :]
    return logits


@pytest.fixture(scope="module", params=list(FAMILIES))
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """All methods on one family, in one engine's batches."""
    directory = tmp_path_factory.mktemp("family")
    family = request.param.removesuffix("-350m")
    checkpoint = make_checkpoint(directory / "model", family, seed=8, **FAMILIES[request.param])
    reference = load_transformers(checkpoint)
    expected: dict[AdapterMethod | None, Tensor] = {None: logits_of(reference)}
    for method, make_config in METHODS.items():
        config = make_config(linears_of(family))
        config.task_type = "CAUSAL_LM"
        if hasattr(config, "token_dim") and method is not AdapterMethod.PREFIX_TUNING:
            config.token_dim = reference.get_input_embeddings().embedding_dim
        peft = make_peft(reference, config, size=0.3)
        save_peft(peft, directory / method.value, save_embedding_layers=False)
        fields = {"task_ids": torch.tensor([0])} if method is AdapterMethod.MULTITASK_PROMPT_TUNING else {}
        expected[method] = logits_of(peft, **fields)
    answers = asyncio.run(answer_all(directory, checkpoint))
    return {method: (answers[method], logits) for method, logits in expected.items()}


async def answer_all(directory: Path, checkpoint: Path) -> dict[AdapterMethod | None, Answer]:
    model = load_tiny(checkpoint)
    response = ResponseOptions(logprobs=True, top_logprobs=100, prompt_logprobs=True)
    with closing(open_store(directory / "store", model.description, [directory])) as store:
        records = {
            method: store.register(
                Registration(method.value.replace("_", "-"), Uri(str(directory / method.value)))
            ).record
            for method in METHODS
        }
        async with running_engine(model, store.lower, max_num_batched_tokens=48) as engine:
            methods = [None, *METHODS]
            answers = await asyncio.gather(
                *(
                    collect(
                        engine,
                        make_request(IDS, records[m] if m else None, new_tokens=1, response=response),
                    )
                    for m in methods
                )
            )
    assert all(record.method is method for method, record in records.items())
    return dict(zip(methods, answers, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_log_probabilities_are_peft_s_at_every_position(found: Found, method: AdapterMethod) -> None:
    answer, logits = found[method]
    expected = logits.double().log_softmax(-1)
    for position, token in enumerate((*answer.prompt_tokens[1:], answer.tokens[0])):
        assert token.logprob == pytest.approx(float(expected[position, token.id]), abs=TOLERANCE)
        best = torch.tensor([top.logprob for top in token.top], dtype=torch.float64)
        wanted = expected[position, [top.id for top in token.top]]
        torch.testing.assert_close(best, wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_the_adapter_moves_them_clearly(found: Found, method: AdapterMethod) -> None:
    _, logits = found[method]
    assert (logits - found[None][1]).abs().max() > 0.05
