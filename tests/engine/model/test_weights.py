from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from manyhats.engine.checkpoints.checkpoint import (
    SafetensorsDirectory,
    assemble_weights,
    check_quantization_config,
    check_tensors,
    read_json,
)
from manyhats.engine.checkpoints.nf4_cache import quantize_checkpoint
from manyhats.engine.errors import ModelError
from manyhats.engine.model.families.reading import read_family
from manyhats.engine.model.layout import Family
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Linear, Weights
from manyhats.engine.progress import no_progress
from support.factories.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "m", "llama", dtype=torch.bfloat16)


def family_of(directory: Path) -> Family:
    return read_family(read_json(directory / "config.json"))


def read(directory: Path, dtype: torch.dtype = torch.float32) -> Weights:
    family, tensors = family_of(directory), SafetensorsDirectory(directory)
    check_tensors(tensors, family)
    return assemble_weights(tensors, family, dtype=dtype, keep_nf4=False, progress=no_progress)


def dense(linear: Linear) -> Tensor:
    assert isinstance(linear.matrix, Tensor)
    return linear.matrix


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint with its tensors changed in place by ``change``."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_weights_are_those_transformers_reads(tmp_path: Path, family: str, tie: bool) -> None:
    directory = make_checkpoint(tmp_path / "m", family, tie=tie, head_dim=32)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours = read(directory)
    assert torch.equal(ours.embedding, theirs.model.embed_tokens.weight)
    assert torch.equal(dense(ours.head), theirs.lm_head.weight)
    assert ("lm_head" not in ours.outer) == tie
    assert torch.equal(ours.final_norm.weight, theirs.model.norm.weight)
    for block, their_layer in zip(ours.blocks, theirs.model.layers, strict=True):
        before_feed_forward = block.norms["feed_forward_before"].weight
        assert torch.equal(block.norms["attention_before"].weight, their_layer.input_layernorm.weight)
        assert torch.equal(before_feed_forward, their_layer.post_attention_layernorm.weight)
        modules = {**dict(their_layer.self_attn.named_children()), **dict(their_layer.mlp.named_children())}
        for name, linear in block.linears.items():
            assert torch.equal(dense(linear), modules[name].weight)
            assert (linear.bias is None) == (modules[name].bias is None)
            if linear.bias is not None:
                assert torch.equal(linear.bias, modules[name].bias)


def test_dtype_is_that_of_matrices_and_norms_stay_float32(llama: Path) -> None:
    weights = read(llama, torch.bfloat16)
    assert weights.embedding.dtype is torch.bfloat16
    assert dense(weights.head).dtype is torch.bfloat16
    assert weights.final_norm.weight.dtype is torch.float32
    assert weights.blocks[0].norms["attention_before"].weight.dtype is torch.float32
    assert dense(weights.blocks[0].linears["q_proj"]).dtype is torch.bfloat16


def test_embedding_and_head_are_aligned_for_vector_loads(llama: Path) -> None:
    weights = read(llama, torch.bfloat16)
    assert weights.embedding.data_ptr() % 64 == 0
    assert dense(weights.head).data_ptr() % 64 == 0


def test_linears_come_in_the_order_of_the_forward_with_their_shapes(llama: Path) -> None:
    linears = read(llama).blocks[1].linears
    assert list(linears) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert (linears["k_proj"].in_features, linears["k_proj"].out_features) == (64, 32)


def test_shards_are_read_through_their_index(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    assert torch.equal(read(tmp_path).embedding, read(llama).embedding)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors: not a readable safetensors file"):
        read(tmp_path)


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "a.bin", 3])
def test_index_that_points_elsewhere_is_refused(tmp_path: Path, file: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(ModelError, match="must name files of the same directory"):
        SafetensorsDirectory(tmp_path)


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickled weights are refused"):
        SafetensorsDirectory(tmp_path)


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_truncated_file_is_refused(llama: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:size])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"has no tensor model\.norm\.weight"),
        (lambda t: t.pop("lm_head.weight"), r"has no tensor lm_head\.weight"),
        (
            lambda t: t.update({"extra.weight": torch.zeros(1)}),
            r"1 tensors that the model does not use: extra",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(128, 65)}),
            r"layers\.1\.mlp\.up_proj\.weight: has shape \[128, 65\]; the config asks for \[128, 64\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}),
            r"norm\.weight: has dtype torch\.int32",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_its_config_is_refused(
    llama: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    directory = rewrite(llama, tmp_path / "m", change)
    with pytest.raises(ModelError, match=message):
        read(directory)


def test_rotary_frequencies_of_older_checkpoints_are_harmless(llama: Path, tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    read(rewrite(llama, tmp_path / "m", lambda tensors: tensors.update({key: torch.zeros(8)})))


def test_tied_head_in_the_file_must_equal_the_embedding(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "m", tie=True)
    same = rewrite(tied, tmp_path / "same", lambda t: t.update(_head(t["model.embed_tokens.weight"])))
    assert not read(same).outer
    other = rewrite(tied, tmp_path / "other", lambda t: t.update(_head(t["model.embed_tokens.weight"] + 1)))
    with pytest.raises(ModelError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        read(other)


def _head(weight: Tensor) -> dict[str, Tensor]:
    return {"lm_head.weight": weight.clone()}


def test_dequantized_checkpoint_is_its_nf4_weights_in_float32(llama: Path) -> None:
    family = family_of(llama)
    quantized = quantize_checkpoint(SafetensorsDirectory(llama), family, no_progress)
    check_tensors(quantized, family)
    nf4, dequantized = (
        assemble_weights(quantized, family, dtype=torch.float32, keep_nf4=keep, progress=no_progress)
        for keep in (True, False)
    )
    weight = nf4.blocks[0].linears["down_proj"].matrix
    assert isinstance(weight, Nf4Weight)
    assert torch.equal(weight.dequantize(), dense(dequantized.blocks[0].linears["down_proj"]))


def test_linear_left_dense_among_nf4_ones_stays_dense(llama: Path) -> None:
    family = family_of(llama)
    key = "model.layers.1.self_attn.o_proj.weight"
    mixed = quantize_checkpoint(SafetensorsDirectory(llama), family, no_progress)
    mixed = {name: tensor for name, tensor in mixed.items() if not name.startswith(key)}
    mixed[key] = SafetensorsDirectory(llama)[key]
    check_tensors(mixed, family)
    weights = assemble_weights(mixed, family, dtype=torch.float32, keep_nf4=True, progress=no_progress)
    assert torch.equal(dense(weights.blocks[1].linears["o_proj"]), mixed[key])


def test_width_that_nf4_cannot_hold_is_refused_with_the_way_out(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", intermediate_size=96)
    with pytest.raises(ModelError, match=r"down_proj\.weight: NF4 needs .* not 96; --quantization none"):
        quantize_checkpoint(SafetensorsDirectory(directory), family_of(directory), no_progress)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "quantization by 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "only the 4-bit ones"),
        ({"quant_method": "bitsandbytes"}, "only the 4-bit ones"),
    ],
)
def test_other_quantized_checkpoints_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_quantization_config({"quantization_config": config})


def test_config_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        read_json(tmp_path / "config.json")
    for content in (b"{", b"[]", b"\xff"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelError, match=r"not JSON|not a JSON object"):
            read_json(tmp_path / "config.json")
