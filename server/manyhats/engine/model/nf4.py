"""NF4, by default with double quantization, exactly as bitsandbytes does it.

A matrix is split, row by row, into blocks of 64 values. A value is the nearest of 16 codes (quantiles of a normal
distribution) times its block's absmax. The absmaxes, less their mean, are themselves kept as 8-bit codes in blocks of
256 with a float32 absmax each: 4 + 8/64 + 32/(64·256) bits per value. Other checkpoints may keep the absmaxes as they
are: 4 + 32/64 bits.

Source: Dettmers et al. 2023 (arXiv:2305.14314), section 3; bitsandbytes 0.50.2 ``functional.quantize_4bit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manyhats.engine.errors import ModelError

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of the 16 codes (Dettmers et al. 2023, appendix E)."""


@dataclass(frozen=True, slots=True, eq=False)
class Nf4Weight:
    """One [out, in] matrix in NF4; in is a multiple of 64, so no block crosses a row.

    Attributes:
        packed: uint8 [out·in / 2], row major, two codes per byte, high nibble first.
        absmax: uint8 [num_blocks], codes into ``nested_code``; or float32, the absmaxes as they are.
        nested_absmax: float32 [⌈num_blocks / 256⌉]; empty for plain absmaxes.
        offset: the mean of the absmaxes, a float32 value; 0 for plain ones.
        code: float32 [16], ``NF4_CODE``.
        nested_code: float32 [256]; empty for plain absmaxes.
        shape: (out, in).

    Raises:
        ModelError: a tensor has the wrong shape or dtype.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: float
    code: Tensor
    nested_code: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if columns % BLOCK_SIZE:
            raise ModelError(f"NF4 needs a multiple of {BLOCK_SIZE} input features, not {columns}")
        num_blocks = rows * columns // BLOCK_SIZE
        expected = {
            "packed": (self.packed, torch.uint8, rows * columns // 2),
            "absmax": (self.absmax, torch.uint8 if self.is_nested else torch.float32, num_blocks),
            "nested_absmax": (
                self.nested_absmax,
                torch.float32,
                -(-num_blocks // NESTED_BLOCK_SIZE) if self.is_nested else 0,
            ),
            "code": (self.code, torch.float32, 16),
            "nested_code": (self.nested_code, torch.float32, 256 if self.is_nested else 0),
        }
        for name, (tensor, dtype, size) in expected.items():
            if tensor.dtype is not dtype or tuple(tensor.shape) != (size,):
                raise ModelError(
                    f"NF4 {name} of a {rows} x {columns} matrix must be {dtype} [{size}], "
                    f"not {tensor.dtype} {list(tensor.shape)}"
                )

    @property
    def is_nested(self) -> bool:
        """Whether the absmaxes are themselves quantized."""
        return self.absmax.dtype is not torch.float32

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed codes and both levels of statistics, without the shared code tables."""
        return sum(t.numel() * t.element_size() for t in (self.packed, self.absmax, self.nested_absmax)) + 4

    def block_scales(self) -> Tensor:
        """The absmax of each block, dequantized: float32 [num_blocks]."""
        if not self.is_nested:
            return self.absmax
        return nested_scales(
            self.absmax, self.nested_absmax, self.nested_code, self.offset, NESTED_BLOCK_SIZE
        )

    def dequantize(self) -> Tensor:
        """The matrix as float32 [out, in], bit-equal to bitsandbytes' ``dequantize_4bit`` in float32."""
        values = unpacked(self.packed, self.code).view(-1, BLOCK_SIZE)
        return values.mul_(self.block_scales().unsqueeze(1)).view(self.shape)

    def select(self, rows: Sequence[int]) -> Nf4Weight:
        """Some rows, in any order, as a separate matrix of the same values.

        Those that begin with a group of 256 blocks and follow one another share this one's memory; of others the
        absmaxes are plain.
        """
        per_row = self.shape[1] // BLOCK_SIZE
        if isinstance(rows, range) and rows.step == 1:
            first, last = rows.start * per_row, rows.stop * per_row
            if not self.is_nested or first % NESTED_BLOCK_SIZE == 0:
                return self._cut(first, last)
        at, empty = torch.tensor(rows), torch.empty(0)
        return replace(
            self,
            packed=self.packed.view(self.shape[0], -1)[at].reshape(-1),
            absmax=self.block_scales().view(self.shape[0], -1)[at].reshape(-1),
            nested_absmax=empty,
            offset=0.0,
            nested_code=empty,
            shape=(len(rows), self.shape[1]),
        )

    def _cut(self, first: int, last: int) -> Nf4Weight:
        """Blocks first … last, of whole rows; the first begins a group."""
        groups = slice(first // NESTED_BLOCK_SIZE, -(-last // NESTED_BLOCK_SIZE))
        return replace(
            self,
            packed=self.packed[first * BLOCK_SIZE // 2 : last * BLOCK_SIZE // 2],
            absmax=self.absmax[first:last],
            nested_absmax=self.nested_absmax[groups],
            shape=((last - first) * BLOCK_SIZE // self.shape[1], self.shape[1]),
        )


def unpacked(packed: Tensor, code: Tensor) -> Tensor:
    """The codes of uint8 [n] bytes, high nibble first, as float32 [2 n] values of the table ``code``."""
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)  # [256, 2]
    return pairs.index_select(0, packed.int()).view(-1)


def nested_scales(
    absmax: Tensor, nested_absmax: Tensor, nested_code: Tensor, offset: float, block_size: int
) -> Tensor:
    """Absmaxes quantized in blocks of ``block_size``, dequantized: float32, one for each uint8 code."""
    # Two roundings, product then sum, as bitsandbytes does; a fused multiply-add differs in the last bit.
    per_block = nested_absmax.repeat_interleave(block_size)[: absmax.numel()]
    return nested_code[absmax.int()].mul_(per_block).add_(offset)


def quantize_nf4(weight: Tensor) -> Nf4Weight:
    """NF4 of a dense [out, in] matrix (bfloat16, float16 or float32), by bitsandbytes itself.

    Raises:
        ModelError: in is not a multiple of 64.
    """
    # Imported here: it takes seconds, and a start from cached NF4 weights never quantizes.
    from bitsandbytes.functional import quantize_4bit

    rows, columns = weight.shape
    if columns % BLOCK_SIZE:
        raise ModelError(f"NF4 needs a multiple of {BLOCK_SIZE} input features, not {columns}")
    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
    )
    return Nf4Weight(
        packed=packed.reshape(-1),
        absmax=state.absmax.reshape(-1),
        nested_absmax=state.state2.absmax.reshape(-1),
        offset=float(state.offset),
        code=state.code,
        nested_code=state.state2.code,
        shape=(rows, columns),
    )


def has_bf16_product() -> bool:
    """Whether this processor, torch and bitsandbytes support a fused product of NF4 weights in bfloat16."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False  # without importing bitsandbytes, which takes seconds
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())
