from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from support.factories.adapters import make_lora
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import Prompt, Ran, Runner, load_tiny, random_ids, read_lora
from support.oracles.transformers import dequantize_into, full_logits, load_transformers

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS: dict[str, dict[str, Any]] = {
    "plain, all linears": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "rank-stabilised": {
        "r": 9,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj"],
        "rank_pattern": {"q_proj": 6, "model.layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 3, "up_proj": 20},
    },
    "one layer, two linears": {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": ["v_proj", "gate_proj"],
        "layers_to_transform": [1],
    },
    "rank 64": {"r": 64, "lora_alpha": 32, "target_modules": ["k_proj", "gate_proj"]},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"family": "mistral", "sliding_window": 20},
    "qwen2": {"family": "qwen2", "tie": True},
}
LENGTHS = (1, 17, 40)


def make_peft(directory: Path, model: nn.Module, config: dict[str, Any], seed: int) -> PeftModel:
    """A PEFT model with random matrices, saved to ``directory``."""
    peft: PeftModel = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    peft.train(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
    peft.save_pretrained(str(directory))
    return peft


def run(model: LoadedModel, adapter: Path, backend: Backend | None = None, **options: Any) -> list[Ran]:
    """Prompts on the adapter, base prompts between them."""
    runner = Runner(model, backend, adapters={3: read_lora(adapter, model.description)})
    return runner.run(prompts_of(slot=3), all_logits=True, **options)


def prompts_of(slot: int) -> list[Prompt]:
    return [
        Prompt(random_ids(length, length, TINY_VOCAB_SIZE), slot=which, new_tokens=3)
        for length in LENGTHS
        for which in (0, slot)
    ]


def assert_equals(runs: list[Ran], model: nn.Module) -> None:
    for ran in runs:
        expected = full_logits(model, ran.token_ids)
        torch.testing.assert_close(ran.stacked, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("lora") / "model", seed=2)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_peft_s_for_every_config(config: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    base = load_transformers(llama)
    runs = run(load_tiny(llama), save(llama, config, tmp_path), max_tokens=20)
    assert_equals(runs[0::2], base)
    assert_equals(runs[1::2], make_peft(tmp_path / "again", base, config, seed=1))
    moved = [
        (ran.logits[0] - other.logits[0]).abs().max()
        for ran, other in zip(runs[0::2], runs[1::2], strict=True)
    ]
    assert min(moved) > 0.01


def save(checkpoint: Path, config: dict[str, Any], tmp_path: Path) -> Path:
    make_peft(tmp_path / "adapter", load_transformers(checkpoint), config, seed=1)
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_peft_s_for_every_family(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", seed=6, **FAMILIES[family])
    config = CONFIGS["plain, all linears"] | {"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}
    peft = make_peft(tmp_path / "adapter", load_transformers(checkpoint), config, seed=4)
    assert_equals(run(load_tiny(checkpoint), tmp_path / "adapter", max_tokens=16)[1::2], peft)


def test_nf4_equals_peft_over_the_dequantized_weights(llama: Path, tmp_path: Path) -> None:
    model = load_tiny(llama, "nf4")
    base = load_transformers(llama)
    dequantize_into(base, model)
    peft = make_peft(tmp_path / "adapter", base, CONFIGS["plain, all linears"], seed=5)
    assert_equals(run(model, tmp_path / "adapter", max_tokens=25)[1::2], peft)


def test_bfloat16_adapters_stay_near(llama: Path, tmp_path: Path) -> None:
    adapter = save(llama, CONFIGS["plain, all linears"], tmp_path)
    exact = run(load_tiny(llama, "nf4"), adapter)[-1]
    model = load_tiny(llama, "nf4", torch.bfloat16)
    runner = Runner(
        model,
        adapters={1: read_lora(adapter, model.description)},
        cache_dtype="bfloat16",
        adapter_dtype="bfloat16",
    )
    ran = runner.run([Prompt(exact.token_ids, slot=1, new_tokens=0)], all_logits=True)[0]
    difference = ran.stacked.log_softmax(-1) - exact.stacked.log_softmax(-1)
    assert 0 < difference.abs().mean() < 0.1


def test_both_backends_agree_and_need_no_peft_to_read_an_adapter(llama: Path, tmp_path: Path) -> None:
    model = load_tiny(llama)
    directory = make_lora(
        tmp_path, model.description, rank={"q_proj": 3, "up_proj": 5}, sites=("q_proj", "up_proj")
    )
    for ran, other in zip(
        run(model, directory, CpuBackend()), run(model, directory, TorchBackend()), strict=True
    ):
        assert ran.token_ids == other.token_ids
        torch.testing.assert_close(ran.stacked, other.stacked, atol=1e-4, rtol=1e-4)
