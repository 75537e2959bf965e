"""Logits of a tiny random model of each family against transformers', and with LoRA against PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from manyhats.adapters.primitives import LoweredAdapter, LowRank
from manyhats.adapters.sites import BaseDescription, Site
from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.backends import batched_backend
from support.harnesses.engine import Prompt, Ran, Runner, digest_of, load_tiny, random_ids
from support.oracles.transformers import full_logits, load_transformers

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
LENGTHS = (1, 17, 33, 70)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + 0.5 * i for i in range(16)],
}
PHI3: dict[str, Any] = {"family": "phi3", "hidden_size": 128}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"family": "qwen3", "tie": True},
    "qwen3, window, biases, wide heads": {
        "family": "qwen3",
        "sliding_window": 18,
        "attention_bias": True,
        "head_dim": 32,
    },
    "gemma2": {"family": "gemma2", "tie": True, "sliding_window": 20, "num_layers": 3},
    "gemma2, no caps, own head": {
        "family": "gemma2",
        "sliding_window": 9,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "heads": 6,
        "kv_heads": 2,
        "hidden_size": 96,
    },
    "gemma3": {"family": "gemma3_text", "tie": True, "sliding_window": 20, "num_layers": 3},
    "gemma3, cap, stretched, odd vocabulary": {
        "family": "gemma3_text",
        "sliding_window": 1,
        "rope": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
        "final_logit_softcapping": 5.0,
        "vocab_size": 323,
    },
    "phi3": {**PHI3, "kv_heads": 4},
    "phi3, window, part of the head": {
        **PHI3,
        "sliding_window": 20,
        "rope": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "phi3, longrope, short": {**PHI3, "rope": LONGROPE, "original_max_position_embeddings": 512},
    "granite": {"family": "granite", "tie": True},
    "granite, biases": {"family": "granite", "attention_bias": True, "mlp_bias": True},
    "olmo2": {"family": "olmo2"},
    "olmo2, biases, tied": {"family": "olmo2", "attention_bias": True, "tie": True, "kv_heads": 4},
    "smollm3": {"family": "smollm3", "tie": True, "num_layers": 3},
    "smollm3, window, biases": {
        "family": "smollm3",
        "sliding_window": 12,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gemma": {"family": "gemma", "tie": True},
    "gpt2": {"family": "gpt2", "tie": True, "kv_heads": 4},
    "gpt2, scores divided by layer, own head": {
        "family": "gpt2",
        "kv_heads": 4,
        "num_layers": 3,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "gptj": {"family": "gptj", "kv_heads": 4},
    "starcoder2": {"family": "starcoder2", "sliding_window": 20},
    "starcoder2, no biases, tied": {"family": "starcoder2", "use_bias": False, "tie": True},
    "gpt_neox": {"family": "gpt_neox", "kv_heads": 4},
    "gpt_neox, one after the other, an odd half of a head": {
        "family": "gpt_neox",
        "kv_heads": 4,
        "use_parallel_residual": False,
        "hidden_size": 192,
        "rope": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    },
    "gpt_neox, no biases in the attention": {"family": "gpt_neox", "kv_heads": 4, "attention_bias": False},
    "opt": {"family": "opt", "tie": True, "kv_heads": 4},
    "opt, norms behind, projections": {
        "family": "opt",
        "tie": True,
        "kv_heads": 4,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 32,
    },
    "opt, bare norms, no biases": {
        "family": "opt",
        "kv_heads": 4,
        "layer_norm_elementwise_affine": False,
        "enable_bias": False,
    },
    "opt, no final norm": {"family": "opt", "kv_heads": 4, "_remove_final_layer_norm": True},
    "phi": {"family": "phi"},
    "phi, norms of heads": {"family": "phi", "kv_heads": 4, "qk_layernorm": True},
    "falcon, one head of keys": {"family": "falcon", "multi_query": True, "tie": True},
    "falcon, all heads, one after the other": {
        "family": "falcon",
        "multi_query": False,
        "parallel_attn": False,
        "num_kv_heads": 4,
        "bias": True,
    },
    "falcon, new": {"family": "falcon", "new_decoder_architecture": True, "bias": True},
    "falcon, new, one norm": {
        "family": "falcon",
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
    },
    "cohere": {"family": "cohere", "tie": True},
    "cohere, norms of heads, biases": {"family": "cohere", "use_qk_norm": True, "attention_bias": True},
    "cohere2": {"family": "cohere2", "sliding_window": 20, "tie": True},
    "mixtral": {"family": "mixtral"},
    "mixtral, window, one expert a row, odd numbers": {
        "family": "mixtral",
        "sliding_window": 20,
        "num_local_experts": 7,
        "num_experts_per_tok": 1,
        "tie": True,
        "intermediate_size": 48,
    },
    "mixtral, all experts": {"family": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 3},
    "qwen3_moe": {"family": "qwen3_moe"},
    "qwen3_moe, dense layers, weights as they are, window, biases": {
        "family": "qwen3_moe",
        "num_layers": 5,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": False,
        "sliding_window": 18,
        "attention_bias": True,
    },
}
LORAS: dict[str, dict[str, Any]] = {
    "qwen3": {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]},
    "gemma2": {"target_modules": "all-linear"},
    "gemma3_text": {"target_modules": ["k_proj", "o_proj", "gate_proj"]},
    "phi3": {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]},
    "granite": {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]},
    "olmo2": {"target_modules": "all-linear"},
    "smollm3": {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True},
    "gemma": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "gptj": {"target_modules": ["q_proj", "k_proj", "fc_in", "fc_out"]},
    "starcoder2": {"target_modules": ["q_proj", "c_fc", "c_proj"]},
    "gpt_neox": {"target_modules": ["query_key_value", "dense", "dense_h_to_4h"]},
    "opt": {"target_modules": ["q_proj", "v_proj", "fc2"]},
    "phi": {"target_modules": ["q_proj", "v_proj", "fc1", "dense"]},
    "falcon": {"target_modules": "all-linear"},
    "cohere": {"target_modules": ["q_proj", "k_proj", "up_proj"]},
    "cohere2": {"target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj"]},
    "mixtral": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "qwen3_moe": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
}
WINDOWED = {"qwen3", "gemma2", "gemma3_text", "smollm3", "starcoder2", "cohere2"}


@pytest.fixture(scope="module", params=list(MODELS.values()), ids=list(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("families") / "model", seed=3, **request.param)


def prompts_of(slots: tuple[int, ...] = (0,)) -> list[Prompt]:
    return [
        Prompt(random_ids(length, length, TINY_VOCAB_SIZE), slot=slot, new_tokens=4)
        for length in LENGTHS
        for slot in slots
    ]


def assert_equals(runs: list[Ran], model: nn.Module) -> None:
    """All logits, and the greedy continuation."""
    for ran in runs:
        expected = full_logits(model, ran.token_ids)
        torch.testing.assert_close(ran.stacked, expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert ran.token_ids[-4:] == expected[-5:-1].argmax(-1).tolist()


def assert_same_bits(runs: list[Ran], others: list[Ran]) -> None:
    for ran, other in zip(runs, others, strict=True):
        assert ran.token_ids == other.token_ids
        assert torch.equal(ran.stacked, other.stacked)


def test_logits_equal_transformers_in_ragged_batches_however_they_are_cut(checkpoint: Path) -> None:
    model = load_tiny(checkpoint)
    runs = Runner(model, CpuBackend(2)).run(prompts_of(), all_logits=True)
    assert_equals(runs, load_transformers(checkpoint))
    alone = Runner(model, CpuBackend(1))
    assert_same_bits(runs, alone.run(prompts_of(), all_logits=True, max_tokens=13))
    for prompt, ran in zip(prompts_of(), runs, strict=True):
        assert_same_bits([ran], alone.run([prompt], all_logits=True))


@pytest.mark.parametrize("backend", [TorchBackend(), batched_backend()], ids=["by row", "batched"])
def test_both_backends_agree(checkpoint: Path, backend: Backend) -> None:
    runner = Runner(load_tiny(checkpoint), backend)
    prompts = [Prompt(random_ids(length, length, TINY_VOCAB_SIZE), new_tokens=4) for length in (5, 26)]
    runs = runner.run(prompts, all_logits=True, max_tokens=11)
    assert_equals(runs, load_transformers(checkpoint))


def test_longrope_past_the_trained_length_takes_the_long_factors(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(
        tmp_path / "model", seed=4, rope=LONGROPE, original_max_position_embeddings=32, **PHI3
    )
    model = load_tiny(checkpoint)
    rope = model.architecture.attention.rope
    assert rope is not None
    assert rope.attention_scaling > 1
    # transformers takes the long factors for a text that is longer than the trained length.
    prompts = [Prompt(random_ids(length, length, TINY_VOCAB_SIZE), new_tokens=4) for length in (40, 70)]
    assert_equals(Runner(model).run(prompts, all_logits=True), load_transformers(checkpoint))


def lowered(peft: PeftModel, base: BaseDescription) -> LoweredAdapter:
    """A PEFT model's LoRA as the engine's primitives; B of a fused module is cut by its parts' rows."""
    deltas = []
    for name, module in peft.named_modules():
        path = name.removeprefix("base_model.model.")
        if path not in base.modules or not hasattr(module, "lora_A"):
            continue
        a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
        scale = module.scaling["default"]
        deltas += [LowRank(part.site, a, b[list(part.rows)], scale) for part in base.modules[path]]
    return LoweredAdapter(digest_of("peft"), tuple(deltas))


def make_peft(model: nn.Module, config: dict[str, Any]) -> PeftModel:
    """A PEFT model with random matrices."""
    peft: PeftModel = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **config))
    peft.train(False)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
    return peft


@pytest.mark.parametrize("family", LORAS)
def test_lora_equals_peft_s(family: str, tmp_path: Path) -> None:
    windowed = family in WINDOWED
    options: dict[str, Any] = {"family": family, **({"sliding_window": 20} if windowed else {"kv_heads": 4})}
    if family == "phi3":
        options = PHI3
    checkpoint = make_checkpoint(tmp_path / "model", seed=6, **options)
    model = load_tiny(checkpoint)
    peft = make_peft(load_transformers(checkpoint), LORAS[family])
    adapter = lowered(peft, model.description)
    runner = Runner(model, adapters={2: adapter})
    runs = runner.run(prompts_of((0, 2)), all_logits=True, max_tokens=20)
    assert_equals(runs[0::2], load_transformers(checkpoint))
    assert_equals(runs[1::2], peft)
    for ran, other in zip(runs[0::2], runs[1::2], strict=True):
        assert (ran.logits[0] - other.logits[0]).abs().max() > 0.01
    for backend in (TorchBackend(), batched_backend()):
        slow = Runner(model, backend, adapters={2: adapter}).run(prompts_of((2,))[:2], all_logits=True)
        assert_equals(slow, peft)


@torch.no_grad()
def with_stored_weights(model: nn.Module, loaded: LoadedModel) -> nn.Module:
    """Give transformers' model the weights that a loaded one stands for, in the order of its matrices' rows."""
    for path, parts in loaded.description.modules.items():
        if parts[0].site.layer >= 0:
            weight = model.get_parameter(f"{path}.weight")
            if loaded.architecture.model_type == "gpt2":
                weight = weight.T  # type: ignore[assignment]
            for part in parts:
                weight[list(part.rows)] = weight_of(loaded, part.site)
    return model


def weight_of(loaded: LoadedModel, site: Site) -> Tensor:
    assert loaded.description.weights is not None
    return loaded.description.weights.linear(site)[0]


@pytest.mark.parametrize(
    "options",
    [
        {**PHI3, "kv_heads": 4},
        {**PHI3, "kv_heads": 1},  # cut inside a group of 256 blocks
        {"family": "gpt2", "kv_heads": 4},
        {"family": "gpt_neox", "kv_heads": 4},
        {"family": "falcon", "new_decoder_architecture": True},
        {"family": "gptj", "kv_heads": 4},
        {"family": "cohere2"},
    ],
    ids=["phi3", "phi3, one head of keys", "gpt2", "gpt_neox", "falcon", "gptj", "cohere2"],
)
def test_nf4_of_stored_matrices_equals_the_dequantized_model(options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16, intermediate_size=256, **options)
    loaded = load_tiny(checkpoint, "nf4")
    runs = Runner(loaded).run(prompts_of(), all_logits=True)
    assert_equals(runs, with_stored_weights(load_transformers(checkpoint), loaded))
    # A second load takes the cached weights: the stored ones, as bitsandbytes quantizes them.
    assert_same_bits(runs, Runner(load_tiny(checkpoint, "nf4")).run(prompts_of(), all_logits=True))


@pytest.mark.parametrize("family", ["gemma2", "granite", "olmo2"])
def test_bfloat16_storage_stays_near_and_keeps_the_invariant(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16)
    runner = Runner(load_tiny(checkpoint, "nf4", torch.bfloat16), cache_dtype="bfloat16")
    runs = runner.run(prompts_of(), all_logits=True)
    assert_same_bits(runs, runner.run(prompts_of(), all_logits=True, max_tokens=9))
    exact = Runner(load_tiny(checkpoint, "nf4"))
    for ran in runs:
        want = exact.run([Prompt(ran.token_ids, new_tokens=0)], all_logits=True)[0]
        difference = ran.stacked.log_softmax(-1) - want.stacked.log_softmax(-1)
        assert 0 < difference.abs().mean() < 0.1


def test_gemma_s_embedding_scale_is_rounded_to_the_dtype_of_the_embedding(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "gemma2", hidden_size=96, heads=6, kv_heads=2)
    exact, rounded = load_tiny(checkpoint), load_tiny(checkpoint, dtype=torch.bfloat16)
    assert exact.architecture.embedding.scale == float(torch.tensor(96**0.5))
    assert rounded.architecture.embedding.scale == float(torch.tensor(96**0.5).bfloat16())
    assert rounded.description.embedding_scale == rounded.architecture.embedding.scale
