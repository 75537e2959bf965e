from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import AutoModel, AutoModelForCausalLM

from manyhats.engine.checkpoints import nf4_cache as cache_module
from manyhats.engine.checkpoints.identity import FileDigests
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import Nf4Weight
from support.factories.default_model import DEFAULT_MODEL, default_model_directory
from support.factories.tiny_models import EOS_TOKEN_ID, TINY_VOCAB_SIZE, make_checkpoint
from support.oracles.golden import GOLDEN, needs_golden


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)


def load(directory: Path, home: Path, **options: Any) -> LoadedModel:
    options = {"quantization": "nf4", "dtype": torch.float32, **options}
    return load_model(str(directory), home=home, **options)


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}))


def forbid_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(*_: object) -> None:
        pytest.fail("quantized again")

    monkeypatch.setattr(cache_module, "quantize_nf4", quantize)


def first_matrix(model: LoadedModel) -> torch.Tensor:
    weight = model.weights.blocks[0].linears["q_proj"].matrix
    assert isinstance(weight, Nf4Weight)
    return weight.dequantize()


def test_second_start_quantizes_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    first = load(tiny, tmp_path / "home", progress=lambda stage, done, total: stages.append(stage))
    assert stages.count("quantize") == 2 * 7 + 1
    forbid_quantizing(monkeypatch)
    stages.clear()
    second = load(tiny, tmp_path / "home", progress=lambda stage, done, total: stages.append(stage))
    assert set(stages) == {"load"}
    assert torch.equal(first_matrix(first), first_matrix(second))
    assert first.description == second.description


def test_copy_of_a_checkpoint_uses_the_same_cache_entry(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tiny, tmp_path / "home")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    forbid_quantizing(monkeypatch)
    assert load(copy, tmp_path / "home").description.digest == first.description.digest


def test_changed_weights_change_the_digest_and_are_quantized_anew(tiny: Path, tmp_path: Path) -> None:
    first = load(tiny, tmp_path / "home")
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 2
    save_file(tensors, tiny / "model.safetensors")
    second = load(tiny, tmp_path / "home")
    assert second.description.digest != first.description.digest
    assert torch.allclose(first_matrix(second), 2 * first_matrix(first))


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "missing"])
def test_damaged_cache_entry_is_made_again(
    tiny: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tiny, tmp_path / "home")
    (entry,) = (tmp_path / "home" / "nf4").iterdir()
    weights = entry / "model.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "manifest":
        (entry / "manyhats.json").write_text("{}")
    else:
        weights.unlink()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(first_matrix(load(tiny, tmp_path / "home")), first_matrix(first))
    assert "damaged" in caplog.text
    forbid_quantizing(monkeypatch)
    load(tiny, tmp_path / "home")


def test_home_that_cannot_be_written_still_serves(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").write_text("a file where a directory would have to be")
    with caplog.at_level(logging.WARNING):
        model = load(tiny, tmp_path / "home")
    assert "cannot be cached" in caplog.text
    assert first_matrix(model).shape == (64, 64)


def test_cache_entry_is_a_checkpoint_that_transformers_reads(tiny: Path, tmp_path: Path) -> None:
    ours = load(tiny, tmp_path / "home")
    (entry,) = (tmp_path / "home" / "nf4").iterdir()
    theirs = AutoModelForCausalLM.from_pretrained(entry, dtype=torch.float32)
    linear = theirs.model.layers[0].self_attn.q_proj
    from bitsandbytes.functional import dequantize_4bit

    linear.weight.quant_state.dtype = torch.float32
    assert torch.equal(dequantize_4bit(linear.weight, linear.weight.quant_state), first_matrix(ours))


def test_nf4_checkpoint_loads_directly(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(tiny, tmp_path / "home")
    (entry,) = (tmp_path / "home" / "nf4").iterdir()
    for path in tiny.glob("*token*"):
        (entry / path.name).write_bytes(path.read_bytes())
    forbid_quantizing(monkeypatch)
    nf4 = load(entry, tmp_path / "other")
    assert torch.equal(first_matrix(nf4), first_matrix(first))
    assert not (tmp_path / "other" / "nf4").exists()
    dense = load(entry, tmp_path / "other", quantization="none")
    assert torch.equal(dense.weights.blocks[0].linears["q_proj"].matrix, first_matrix(first))  # type: ignore[arg-type]


def test_quantization_is_part_of_the_digest(tiny: Path, tmp_path: Path) -> None:
    nf4, dense = (load(tiny, tmp_path / "home", quantization=q).description.digest for q in ("nf4", "none"))
    assert nf4 != dense
    assert nf4.startswith("sha256:")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_has_the_dtype_asked_for_and_linears_stay_nf4(
    tiny: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    weights = load(tiny, tmp_path / "home", dtype=dtype).weights
    assert weights.embedding.dtype is dtype
    assert isinstance(weights.blocks[1].linears["down_proj"].matrix, Nf4Weight)


def test_other_dtypes_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not torch\.float16"):
        load(tiny, tmp_path / "home", dtype=torch.float16)


def test_names_are_those_given_the_path_and_the_recorded_hub_id(tiny: Path, tmp_path: Path) -> None:
    edit_json(tiny / "config.json", _name_or_path="org/tiny")
    model = load(tiny, tmp_path / "home", names=["mine"])
    assert model.description.names == {"org/tiny", "mine", str(tiny)}
    assert model.reference == str(tiny)
    assert model.name == "tiny"
    edit_json(tiny / "config.json", _name_or_path="/some/path")
    assert load(tiny, tmp_path / "home").description.names == {str(tiny)}


def test_max_context_length_is_the_callers_or_the_models(tiny: Path, tmp_path: Path) -> None:
    assert load(tiny, tmp_path / "home").architecture.max_context_length == 512
    assert load(tiny, tmp_path / "home", max_context_length=100).architecture.max_context_length == 100
    with pytest.raises(ModelError, match="max_context_length"):
        load(tiny, tmp_path / "home", max_context_length=513)


def test_eos_is_the_generation_configs_or_the_configs_and_the_tokenizers(tiny: Path, tmp_path: Path) -> None:
    generation, config = tiny / "generation_config.json", tiny / "config.json"
    edit_json(generation, eos_token_id=[7, 9])
    assert load(tiny, tmp_path / "home").generation.eos_token_ids == {7, 9, EOS_TOKEN_ID}
    generation.unlink()
    edit_json(config, eos_token_id=5)
    assert load(tiny, tmp_path / "home").generation.eos_token_ids == {5, EOS_TOKEN_ID}
    edit_json(config, eos_token_id=None)
    assert load(tiny, tmp_path / "home").generation.eos_token_ids == {EOS_TOKEN_ID}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"eos_token": "<|im_start|>"}},
        {"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", "content": "<|im_start|>"}}},
        {"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<|im_start|>"}},
        {
            "tokenizer_config.json": {"eos_token": "<|im_end|>"},
            "special_tokens_map.json": {"eos_token": {"content": "<|im_start|>", "lstrip": False}},
        },
    ],
)
def test_eos_of_the_tokenizer_counts_whichever_file_names_it(
    tiny: Path, tmp_path: Path, files: dict[str, dict[str, Any]]
) -> None:
    edit_json(tiny / "generation_config.json", eos_token_id=7)
    for name, content in files.items():
        (tiny / name).write_text(json.dumps(content))
    assert load(tiny, tmp_path / "home").generation.eos_token_ids == {7, 1}


def test_eos_that_the_tokenizer_adds_beyond_the_embedding_ends_nothing(tiny: Path, tmp_path: Path) -> None:
    table = {str(TINY_VOCAB_SIZE + i): {"content": f"<{i}>", "special": True} for i in range(TINY_VOCAB_SIZE)}
    edit_json(
        tiny / "tokenizer_config.json", eos_token=f"<{TINY_VOCAB_SIZE - 1}>", added_tokens_decoder=table
    )
    edit_json(tiny / "generation_config.json", eos_token_id=7)
    with capture_logs() as logs:
        model = load(tiny, tmp_path / "home")
    assert model.generation.eos_token_ids == {7}
    (note,) = [log for log in logs if "not tokens of the model" in log["event"]]
    assert note["source"] == "the tokenizer: eos_token"


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_missing_file_is_named(tiny: Path, tmp_path: Path, file: str) -> None:
    (tiny / file).unlink()
    with pytest.raises(ModelError, match=file.replace(".", r"\.")):
        load(tiny, tmp_path / "home")


def test_file_just_written_is_hashed_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    digests = FileDigests(tmp_path / "memo")
    assert digests.sha256(file) == hashlib.sha256(b"one").hexdigest()
    # It may change again within the clock's resolution, so its status proves nothing yet.
    status = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests.sha256(file) == hashlib.sha256(b"two").hexdigest()


def test_settled_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    digests = FileDigests(tmp_path / "memo")
    later = file.stat().st_ctime_ns + 10_000_000_000
    monkeypatch.setattr("manyhats.engine.checkpoints.identity.time.time_ns", lambda: later)
    first = digests.sha256(file)
    monkeypatch.setattr(
        "manyhats.engine.checkpoints.identity.file_sha256", lambda path: pytest.fail("read again")
    )
    assert digests.sha256(file) == first


@pytest.mark.real_model
def test_start_from_the_cache_imports_neither_transformers_nor_bitsandbytes() -> None:
    default_model_directory()
    load_model(DEFAULT_MODEL, quantization="nf4", dtype=torch.bfloat16)
    code = (
        "import sys, torch\n"
        "from manyhats.engine.checkpoints.loader import load_model\n"
        f"load_model({DEFAULT_MODEL!r}, quantization='nf4', dtype=torch.bfloat16)\n"
        "print(sorted({'transformers', 'bitsandbytes', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@needs_golden
@pytest.mark.real_model
def test_default_model_in_nf4_has_the_golden_codes() -> None:
    golden = json.loads((GOLDEN / "base" / "tensors.json").read_bytes())
    model = load_model(DEFAULT_MODEL, quantization="nf4", dtype=torch.bfloat16)
    assert model.generation.eos_token_ids == {2}
    assert model.description.names >= {DEFAULT_MODEL, "HuggingFaceTB/SmolLM2-135M-Instruct"}
    num_bytes = num_values = 0
    for index, layer in enumerate(model.weights.blocks):
        for (name, linear), path in zip(layer.linears.items(), _paths(index), strict=True):
            weight = linear.matrix
            assert isinstance(weight, Nf4Weight), name
            expected = golden[path]["nf4_packed"]
            assert hashlib.sha256(weight.packed.numpy().tobytes()).hexdigest() == expected, path
            assert weight.offset == pytest.approx(golden[path]["nf4_offset"], rel=2e-7), path
            num_bytes += weight.num_bytes
            num_values += weight.shape[0] * weight.shape[1]
    assert num_bytes / num_values <= 0.54


def _paths(layer: int) -> list[str]:
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    feed_forward = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    return [f"model.layers.{layer}.{path}.weight" for path in attention + feed_forward]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "starcoder2", "mixtral"])
def test_files_of_models_without_a_head_are_read(tmp_path: Path, family: str, quantization: str) -> None:
    """As embedding models are saved: paths begin within what is the base's elsewhere, and the head is the embedding."""
    whole = make_checkpoint(tmp_path / "whole", family, seed=3, tie=True)
    AutoModel.from_pretrained(whole).save_pretrained(tmp_path / "inner")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "inner" / name).write_bytes((whole / name).read_bytes())
    names = load_file(tmp_path / "inner" / "model.safetensors")
    assert "embed_tokens.weight" in names
    for _ in range(2):  # quantized, then from the cache
        first, second = (
            load(tmp_path / each, tmp_path / each / "home", quantization=quantization)
            for each in ("whole", "inner")
        )
        assert torch.equal(first.weights.embedding, second.weights.embedding)
        for ours, theirs in zip(first.weights.linears(), second.weights.linears(), strict=True):
            dense = [
                each.matrix.dequantize() if isinstance(each.matrix, Nf4Weight) else each.matrix
                for each in (ours, theirs)
            ]
            assert torch.equal(*dense)
