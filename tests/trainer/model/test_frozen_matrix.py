"""The base's matrices as the trainer multiplies with them, from every packing of NF4 that is served."""

from __future__ import annotations

import itertools

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from manyhats.engine.checkpoints.nf4_format import read_quantized
from manyhats.trainer.model.linear import FrozenMatrix


@pytest.mark.parametrize(
    ("double", "storage", "block_size"),
    list(itertools.product((True, False), (torch.uint8, torch.bfloat16, torch.float32), (64, 128, 1024))),
)
def test_a_matrix_is_dense_as_bitsandbytes_has_it_and_counts_its_bytes(
    double: bool, storage: torch.dtype, block_size: int
) -> None:
    matrix = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
    packed, state = quantize_4bit(
        matrix, quant_type="nf4", blocksize=block_size, compress_statistics=double, quant_storage=storage
    )
    tensors = {"w": packed, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}}
    weight = read_quantized("w", tensors, (8, 128)).nf4()
    frozen = FrozenMatrix(weight, torch.device("cpu"))
    expected = dequantize_4bit(packed, state)
    assert torch.equal(frozen.dense(torch.float32), expected)
    out = torch.empty(8, 256)[:, :128]
    frozen.dense_into(out)
    assert torch.equal(out, expected)
    assert frozen.num_bytes == 8 * 128 // 2 + (16 + 4 if double and block_size == 64 else 4 * 16) + 4
