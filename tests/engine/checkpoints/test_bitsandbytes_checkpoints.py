"""Four-bit checkpoints as transformers saves them, in every packing, against transformers + bitsandbytes on them."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor, nn

from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.checkpoints.nf4_format import nf4_to_tensors, read_quantized
from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import Nf4Weight, quantize_nf4
from manyhats.engine.model.weights import Linear
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint, save_tokenizer
from support.harnesses.engine import Prompt, Runner, load_tiny, random_ids
from support.oracles.bitsandbytes import dequantized, with_dense_linears
from support.oracles.transformers import full_logits

TOLERANCE = 1e-4
ONE_DENSE = ("lm_head", "model.layers.1.mlp.down_proj")
MIXED = ("lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj")
WHOLE_LAYER = ("lm_head", "model.layers.0")


@dataclass(frozen=True)
class Packing:
    """How transformers quantizes and stores a model."""

    storage: str = "uint8"
    double: bool = True
    skip: tuple[str, ...] | None = None
    quant_type: str = "nf4"
    family: str = "llama"
    dtype: str = "float32"

    def __str__(self) -> str:
        skip = "default" if self.skip is None else len(self.skip)
        return f"{self.family}-{self.quant_type}-{self.storage}-{self.dtype}-{self.double}-dense:{skip}"


PACKINGS = [
    *(
        Packing(storage, double)
        for storage, double in itertools.product(("uint8", "bfloat16", "float16", "float32"), (True, False))
    ),
    *(Packing("bfloat16", double, MIXED) for double in (True, False)),
    *(Packing("uint8", double, skip) for double, skip in ((True, ONE_DENSE), (False, WHOLE_LAYER))),
    *(
        Packing("bfloat16", double, family=family)
        for family, double in itertools.product(("qwen2", "gemma2", "phi3"), (True, False))
    ),
    Packing("bfloat16", False, MIXED, dtype="bfloat16"),
    Packing("bfloat16", True, MIXED, dtype="float16"),
]


def save_quantized(directory: Path, packing: Packing) -> nn.Module:
    """Quantize a tiny model, save it, and load it again, all by transformers; then dequantize it."""
    import transformers

    fields: dict[str, Any] = {"hidden_size": 256, "num_layers": 2} if packing.family == "phi3" else {}
    source = make_checkpoint(directory / "dense", packing.family, **fields)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=packing.quant_type,
        bnb_4bit_use_double_quant=packing.double,
        bnb_4bit_quant_storage=packing.storage,
        bnb_4bit_compute_dtype="float32",
        llm_int8_skip_modules=None if packing.skip is None else list(packing.skip),
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=getattr(torch, packing.dtype), device_map="cpu"
    )
    model.save_pretrained(directory / "saved")
    save_tokenizer(directory / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "saved", dtype=torch.float32, device_map="cpu"
    )
    for parameter in loaded.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None:
            parameter.data = parameter.data.float()  # transformers keeps the dtype it was saved in
        else:
            state.dtype = torch.float32  # else bitsandbytes rounds what it dequantizes
    return with_dense_linears(loaded).eval()


def largest_difference(checkpoint: Path, quantization: Any, theirs: nn.Module) -> float:
    prompts = [Prompt(random_ids(length, length, TINY_VOCAB_SIZE), new_tokens=2) for length in (3, 17)]
    runs = Runner(load_tiny(checkpoint, quantization)).run(prompts, all_logits=True)
    worst = 0.0
    for ran in runs:
        expected = full_logits(theirs, ran.token_ids)
        for position, logits in ran.logits.items():
            worst = max(worst, float((logits - expected[position]).abs().max()))
    return worst


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_logits_are_those_of_transformers_on_the_same_files(tmp_path: Path, packing: Packing) -> None:
    theirs = save_quantized(tmp_path, packing)
    assert largest_difference(tmp_path / "saved", "nf4", theirs) < TOLERANCE


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_dequantized_they_are_served_too(tmp_path: Path, quant_type: str, double: bool) -> None:
    theirs = save_quantized(tmp_path, Packing("bfloat16", double, MIXED, quant_type))
    assert largest_difference(tmp_path / "saved", "none", theirs) < TOLERANCE


def test_fp4_is_refused_with_the_flag_that_serves_it(tmp_path: Path) -> None:
    save_quantized(tmp_path, Packing(quant_type="fp4"))
    with pytest.raises(ModelError, match="is fp4; --quantization none serves it"):
        load_tiny(tmp_path / "saved", "nf4")


def test_linears_that_the_checkpoint_keeps_dense_stay_dense(tmp_path: Path) -> None:
    save_quantized(tmp_path, Packing(skip=MIXED))
    first, second = load_tiny(tmp_path / "saved", "nf4").weights.blocks
    assert isinstance(first.linears["q_proj"].matrix, Nf4Weight)
    assert isinstance(first.linears["k_proj"].matrix, Tensor)
    assert isinstance(second.linears["gate_proj"].matrix, Tensor)
    assert isinstance(second.linears["up_proj"].matrix, Nf4Weight)


def test_a_config_that_says_nf4_of_dense_weights_is_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no linear of the checkpoint is NF4"):
        load_tiny(directory, "nf4")


# One matrix, in forms that transformers has no setting for.


def saved_matrix(
    shape: tuple[int, int], *, block_size: int, double: bool, quant_type: str, storage: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix's tensors as bitsandbytes saves them, and what it dequantizes them to."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    packed, state = quantize_4bit(
        matrix,
        blocksize=block_size,
        compress_statistics=double,
        quant_type=quant_type,
        quant_storage=storage,
    )
    tensors = {"w": packed, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}}
    return tensors, dequantized(packed, state)


FORMS = list(
    itertools.product(
        ((6, 128), (3, 96), (64, 512)),
        (32, 64, 128, 256, 4096),
        (True, False),
        ("nf4", "fp4"),
        (torch.uint8, torch.bfloat16),
    )
)


@pytest.mark.parametrize(("shape", "block_size", "double", "quant_type", "storage"), FORMS)
def test_every_form_dequantizes_as_bitsandbytes_does_and_is_kept_or_refused_with_the_flag(
    shape: tuple[int, int], block_size: int, double: bool, quant_type: str, storage: torch.dtype
) -> None:
    tensors, expected = saved_matrix(
        shape, block_size=block_size, double=double, quant_type=quant_type, storage=storage
    )
    read = read_quantized("w", tensors, shape)
    assert torch.equal(read.dequantize(), expected)
    if quant_type == "nf4" and block_size >= 64 and shape[1] % 64 == 0:
        kept = read.nf4()
        assert torch.equal(kept.dequantize(), expected)
        assert kept.is_nested == (double and block_size == 64)
    else:
        with pytest.raises(ModelError, match=r"^w: .*--quantization none serves it"):
            read.nf4()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_in_half_precision_are_read_as_bitsandbytes_reads_them(
    dtype: torch.dtype, double: bool
) -> None:
    tensors, _ = saved_matrix((4, 128), block_size=64, double=double, quant_type="nf4", storage=torch.uint8)
    key = "w.nested_absmax" if double else "w.absmax"
    read = read_quantized("w", tensors | {key: tensors[key].to(dtype)}, (4, 128))
    rounded = read_quantized("w", tensors | {key: tensors[key].to(dtype).float()}, (4, 128))
    assert torch.equal(read.nf4().dequantize(), rounded.dequantize())


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
@pytest.mark.parametrize("with_dense", [False, True])
def test_the_kernels_multiply_plain_nested_and_dense_parts_side_by_side(rows: int, with_dense: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    tensors, _ = saved_matrix((48, 128), block_size=64, double=False, quant_type="nf4", storage=torch.uint8)
    plain = read_quantized("w", tensors, (48, 128)).nf4()
    nested = quantize_nf4(torch.randn(21, 128, generator=generator))
    dense = torch.randn(16, 128, generator=generator).bfloat16()
    parts = [Linear(plain), Linear(nested), *([Linear(dense)] if with_dense else [])]
    x = torch.randn(rows, 128, generator=generator)
    kernels = CpuKernels(num_threads=1)
    matrices = [p.matrix.dequantize() if isinstance(p.matrix, Nf4Weight) else p.matrix.float() for p in parts]
    expected = x.double() @ torch.cat(matrices).double().T
    together = kernels.linear(x, kernels.pack(parts))
    torch.testing.assert_close(together.double(), expected, atol=1e-4, rtol=1e-5)
    alone = torch.cat([kernels.linear(x[i : i + 1], kernels.pack(parts)) for i in range(rows)])
    assert torch.equal(together, alone)


def test_the_kernels_multiply_parts_whose_absmaxes_have_different_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (quantize_nf4(torch.randn(16, 128, generator=generator)) for _ in range(2))
    second = replace(second, nested_code=second.nested_code * 0.5)
    x = torch.randn(3, 128, generator=generator)
    kernels = CpuKernels(num_threads=1)
    expected = x.double() @ torch.cat([each.dequantize() for each in (first, second)]).double().T
    found = kernels.linear(x, kernels.pack([Linear(first), Linear(second)]))
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


def test_codes_that_are_not_nf4s_are_refused_and_served_dequantized() -> None:
    tensors = nf4_to_tensors("w", quantize_nf4(torch.ones(2, 128)), torch.float32)
    other = tensors["w.quant_map"].square()
    read = read_quantized("w", tensors | {"w.quant_map": other}, (2, 128))
    with pytest.raises(ModelError, match=r"^w: its quant_map is not NF4's; --quantization none serves it"):
        read.nf4()
    assert torch.equal(read.dequantize(), torch.full((2, 128), float(read.dequantize()[0, 0])))


def test_rows_of_a_matrix_with_plain_absmaxes_can_be_cut_anywhere() -> None:
    tensors, expected = saved_matrix(
        (9, 64), block_size=64, double=False, quant_type="nf4", storage=torch.uint8
    )
    weight = read_quantized("w", tensors, (9, 64)).nf4()
    assert torch.equal(weight.select(range(4, 7)).dequantize(), expected[4:7])


MALFORMED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no absmax table": ({"w.quant_map": None}, r"w\.quant_map is missing"),
    "no nested table": ({"w.nested_quant_map": None}, r"w\.nested_quant_map is missing"),
    "half of the nested": ({"w.nested_absmax": None}, r"w\.nested_absmax is missing"),
    "no state": ({"w.quant_state.bitsandbytes__nf4": None}, "quant_state.* is missing"),
    "too few codes": ({"w": torch.zeros(10, 1, dtype=torch.uint8)}, r"w: has 10 bytes of codes"),
    "too many codes": ({"w": torch.zeros(200, 1, dtype=torch.uint8)}, r"w: has 200 bytes of codes"),
    "too few absmaxes": ({"w.absmax": torch.zeros(3, dtype=torch.uint8)}, r"w\.absmax: has shape \[3\]"),
    "absmax of another dtype": ({"w.absmax": torch.zeros(4, dtype=torch.int32)}, r"w\.absmax: has dtype"),
    "nested of another size": ({"w.nested_absmax": torch.zeros(2)}, r"w\.nested_absmax: has shape \[2\]"),
    "code table of another size": ({"w.quant_map": torch.zeros(8)}, r"w\.quant_map: has shape \[8\]"),
    "code table of integers": ({"w.quant_map": torch.zeros(16, dtype=torch.int8)}, r"quant_map: has dtype"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_tensors_are_refused_by_name(what: str) -> None:
    changes, message = MALFORMED[what]
    tensors = nf4_to_tensors("w", quantize_nf4(torch.ones(2, 128)), torch.float32)
    changed = {key: value for key, value in (tensors | changes).items() if value is not None}
    with pytest.raises(ModelError, match=message):
        read_quantized("w", changed, (2, 128))
