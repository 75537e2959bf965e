"""Mixtures of experts as whole models: NF4, the layouts of their files, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.checkpoints.nf4_format import nf4_to_tensors
from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import Nf4Weight, quantize_nf4
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import Prompt, Ran, Runner, load_tiny, random_ids
from support.oracles.transformers import full_logits, load_transformers

TOLERANCE = 1e-4
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"num_layers": 3, "mlp_only_layers": [1]},
}
PROMPTS = [Prompt(random_ids(length, length, TINY_VOCAB_SIZE), new_tokens=4) for length in (1, 17, 45)]


def checkpoint_of(directory: Path, family: str, **options: Any) -> Path:
    return make_checkpoint(directory / family, family, seed=7, **MODELS[family], **options)


def run(model: LoadedModel, **options: Any) -> list[Ran]:
    return Runner(model, **options).run(PROMPTS, all_logits=True)


def assert_equals(runs: list[Ran], model: nn.Module) -> None:
    for ran in runs:
        expected = full_logits(model, ran.token_ids)
        torch.testing.assert_close(ran.stacked, expected, atol=TOLERANCE, rtol=TOLERANCE)


def assert_same_bits(runs: list[Ran], others: list[Ran]) -> None:
    for ran, other in zip(runs, others, strict=True):
        assert torch.equal(ran.stacked, other.stacked)


@torch.no_grad()
def give_weights(model: nn.Module, loaded: LoadedModel) -> None:
    """Give transformers' model the weights of linears that a loaded one stands for."""
    for layer, weights in enumerate(loaded.weights.blocks):
        for name, linear in weights.linears.items():
            matrix = linear.matrix.dequantize() if isinstance(linear.matrix, Nf4Weight) else linear.matrix
            target_of(model, f"model.layers.{layer}.", name).copy_(matrix)


def target_of(model: nn.Module, layer: str, name: str) -> Tensor:
    if name == "router":
        return model.get_parameter(f"{layer}mlp.gate.weight")
    if name.startswith("experts."):
        _, expert, own = name.split(".")
        fused = "down_proj" if own == "down_proj" else "gate_up_proj"
        stack = model.get_parameter(f"{layer}mlp.experts.{fused}")[int(expert)]
        return stack if own == "down_proj" else stack.chunk(2)[int(own == "up_proj")]
    block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return model.get_parameter(f"{layer}{block}.{name}.weight")


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nf4_equals_the_model_of_the_dequantized_weights_with_the_router_as_it_was(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tmp_path, family, dtype=dtype)
    loaded, reference = load_tiny(checkpoint, "nf4"), load_transformers(checkpoint)
    for layer, weights in enumerate(loaded.weights.blocks):
        kinds = {name: type(linear.matrix) for name, linear in weights.linears.items()}
        assert {name for name, kind in kinds.items() if kind is not Nf4Weight} <= {"router"}
        if "router" in kinds:
            original = target_of(reference, f"model.layers.{layer}.", "router")
            assert torch.equal(loaded.weights.blocks[layer].linears["router"].matrix.float(), original)  # type: ignore[union-attr]
    give_weights(reference, loaded)
    runs = run(loaded)
    assert_equals(runs, reference)
    # A second load takes the cached weights: the stored ones, as bitsandbytes quantizes them.
    assert_same_bits(runs, run(load_tiny(checkpoint, "nf4")))


@pytest.mark.parametrize("family", MODELS)
def test_bfloat16_stays_near_and_keeps_the_invariant(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, family, dtype=torch.bfloat16)
    runner = Runner(load_tiny(checkpoint, "nf4", torch.bfloat16), cache_dtype="bfloat16")
    runs = runner.run(PROMPTS, all_logits=True)
    assert_same_bits(runs, runner.run(PROMPTS, all_logits=True, max_tokens=9))
    exact = Runner(load_tiny(checkpoint, "nf4"))
    for ran in runs:
        want = exact.run([Prompt(ran.token_ids, new_tokens=0)], all_logits=True)[0]
        difference = ran.stacked.log_softmax(-1) - want.stacked.log_softmax(-1)
        # The median, since a row near a tie may go to another expert.
        assert 0 < difference.abs().median() < 0.1


def stacked(checkpoint: Path, directory: Path) -> Path:
    """The same model with its experts as transformers 5 has them in memory."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(directory, save_original_format=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (directory / name).write_bytes((checkpoint / name).read_bytes())
    return directory


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", MODELS)
def test_files_with_all_experts_in_one_tensor_are_the_same_model(
    family: str, quantization: Any, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tmp_path, family)
    other = stacked(checkpoint, tmp_path / "stacked")
    names = load_file(other / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert not any(re.search(r"experts\.\d", name) for name in names)
    assert_same_bits(run(load_tiny(other, quantization)), run(load_tiny(checkpoint, quantization)))


def changed(checkpoint: Path, change: Any) -> Path:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return checkpoint


GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
ONE = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({GATE_UP: t[GATE_UP][:3]}), f"{GATE_UP}: has shape .* each of 4 experts"),
        (lambda t: t.update({GATE_UP: t[GATE_UP][:, :-1]}), f"{GATE_UP}: has shape"),
        (lambda t: t.update({DOWN: t[DOWN][0]}), f"{DOWN}: has shape"),
        (lambda t: t.update({DOWN: t[DOWN][..., :-2]}), "experts.0.w2.weight: has shape"),
        (lambda t: t.update({DOWN: t[DOWN].int()}), "experts.0.w2.weight: has dtype"),
        (lambda t: t.update({ONE: t[GATE_UP][0].clone()}), "which the checkpoint has by itself, too"),
        (lambda t: t.pop(DOWN), "has no tensor model.layers.0.block_sparse_moe.experts.0.w2.weight"),
        (lambda t: t.pop("model.layers.0.mlp.gate.weight"), "has no tensor .*block_sparse_moe.gate.weight"),
    ],
)
def test_stacks_that_do_not_fit_are_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    checkpoint = stacked(checkpoint_of(tmp_path, "mixtral"), tmp_path / "stacked")
    with pytest.raises(ModelError, match=message):
        load_tiny(changed(checkpoint, change))


def test_checkpoints_in_four_bits_may_have_a_quantized_router_which_is_served_dense(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "mixtral", dtype=torch.bfloat16)
    expected = load_tiny(checkpoint, "nf4")
    router = "model.layers.1.block_sparse_moe.gate.weight"

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight") or ".experts." in name] + [
            router
        ]:
            tensors |= nf4_to_tensors(name, quantize_nf4(tensors[name]), torch.bfloat16)

    changed(checkpoint, quantize)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (checkpoint / "config.json").write_text(json.dumps(config))
    found = load_tiny(checkpoint, "nf4")
    own, original = (each.weights.blocks[1].linears["router"].matrix for each in (found, expected))
    assert isinstance(own, Tensor)
    assert isinstance(original, Tensor)
    assert torch.equal(own, quantize_nf4(original).dequantize())
    for name, linear in found.weights.blocks[1].linears.items():
        kept = expected.weights.blocks[1].linears[name].matrix
        if isinstance(linear.matrix, Nf4Weight) and isinstance(kept, Nf4Weight):
            assert torch.equal(linear.matrix.dequantize(), kept.dequantize())
    assert all(ran.stacked.isfinite().all() for ran in run(found))


def test_more_experts_in_the_files_than_in_the_config_are_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "mixtral")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_local_experts": 3}))
    with pytest.raises(ModelError, match=r"block_sparse_moe.gate.weight: has shape \[4, 64\]"):
        load_tiny(checkpoint)


def test_experts_of_no_multiple_of_64_are_not_quantized_to_nf4(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "mixtral", intermediate_size=96)
    with pytest.raises(ModelError, match=r"experts.0.w2.weight: NF4 needs a multiple of 64 .* not 96"):
        load_tiny(checkpoint, "nf4")
