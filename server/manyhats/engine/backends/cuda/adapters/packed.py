"""One adapter laid out for the device: its numbers end to end in host memory, and its record."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manyhats.adapters.primitives import LayerNorm, LowRank
from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.record import EXPERT_MEMBERS, ROW_VALUES, ExpertWord

_ALIGNMENT = 128
"""Bytes: every tensor begins at a multiple, zeros before it, so that a vector can be read to the end of a tile."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """``Packed`` on CUDA.

    Attributes:
        numbers: [bytes] uint8, pinned where there is CUDA: all matrices and vectors.
        record: [words] int64; addresses count from the beginning of the numbers.
        addresses: [n] int64, which of the words are addresses.
        acting: what it does.
        vocab_size: of its task; None if that is the base's.
    """

    numbers: Tensor
    record: npt.NDArray[np.int64]
    addresses: npt.NDArray[np.int64]
    acting: Acting
    vocab_size: int | None

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return int(self.numbers.nbytes + self.record.nbytes + self.addresses.nbytes)

    def record_at(self, address: int) -> npt.NDArray[np.int64]:
        """The record of numbers that begin at an address."""
        record = self.record.copy()
        record[self.addresses] += address
        return record


class RecordWriter:
    """Enters numbers into a record; nothing is copied before all are known.

    Args:
        num_words: of the record.
    """

    def __init__(self, num_words: int) -> None:
        self._record = np.zeros(num_words, np.int64)
        self._addresses: list[int] = []
        self._tensors: list[tuple[int, Tensor, torch.dtype]] = []
        self._end = 0

    def packed(self, acting: Acting, vocab_size: int | None, *, pinned: bool) -> PackedAdapter:
        """Copies what was entered."""
        numbers = torch.zeros(self._end, dtype=torch.uint8, pin_memory=pinned)
        for begin, tensor, dtype in self._tensors:
            _copy(tensor, numbers[begin:], dtype)
        return PackedAdapter(numbers, self._record, np.array(self._addresses, np.int64), acting, vocab_size)

    def set(self, at: int, values: Mapping[IntEnum, int | float]) -> None:
        """Enters words, counted from ``at``."""
        for word, value in values.items():
            self._record[at + word] = _bits(value) if isinstance(value, float) else int(value)

    def norm(self, at: int, norm: LayerNorm) -> None:
        """Enters weight, bias and eps, whose words are side by side."""
        self.vector(at, norm.weight)
        self.vector(at + 1, norm.bias)
        self._record[at + 2] = _bits(norm.eps)

    def matrix(self, word: int, matrix: Tensor) -> None:
        """Enters a matrix [n, k], in bfloat16, its rows padded with zeros."""
        self._record[word] = self._matrix(matrix)
        self._addresses.append(word)

    def vector(self, word: int, vector: Tensor) -> None:
        """Enters a vector, in float32."""
        self._put(word, vector, torch.float32, vector.numel() * 4)

    def integers(self, word: int, values: Tensor) -> None:
        """Enters a vector, in int32."""
        self._put(word, values, torch.int32, values.numel() * 4)

    def gate(self, word: int, weight: Tensor, bias: Tensor) -> None:
        """Enters a gate of one factor: weight [d_in], and behind it the bias, [] float32."""
        self.vector(word, torch.cat((weight.float(), bias.float().reshape(1))))

    def experts(self, word: int, num_experts: int, deltas: Mapping[tuple[int, int], LowRank]) -> None:
        """Enters the table of one layer's experts.

        Args:
            word: of its address.
            num_experts: E.
            deltas: by expert, and the linear's place among ``EXPERT_MEMBERS``.
        """
        table = torch.zeros(num_experts, len(EXPERT_MEMBERS), len(ExpertWord), dtype=torch.int64)
        for (expert, member), delta in deltas.items():
            a, b = self._matrix(delta.a), self._matrix(delta.b.T)
            table[expert, member] = torch.tensor((a, b, delta.rank, _bits(float(delta.scale))))
        has_delta = table[:, :, ExpertWord.RANK] > 0
        for address in (ExpertWord.A, ExpertWord.B):
            table[:, :, address] -= self._end * has_delta
        self._put(word, table.flatten(), torch.int64, table.nbytes)

    def _put(self, word: int, tensor: Tensor, dtype: torch.dtype, num_bytes: int) -> None:
        self._record[word] = self._append(tensor, dtype, num_bytes)
        self._addresses.append(word)

    def _matrix(self, matrix: Tensor) -> int:
        return self._append(matrix, torch.bfloat16, matrix.shape[0] * _padded(matrix.shape[1]) * 2)

    def _append(self, tensor: Tensor, dtype: torch.dtype, num_bytes: int) -> int:
        """Where it will begin."""
        begin = self._end
        self._tensors.append((begin, tensor, dtype))
        self._end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return begin


def _copy(tensor: Tensor, to: Tensor, dtype: torch.dtype) -> None:
    """Copies a matrix, whose rows are padded, or a vector, to the first of some bytes."""
    if tensor.dim() == 1:
        to[: tensor.numel() * dtype.itemsize].view(dtype).copy_(tensor)
        return
    num_rows, size = tensor.shape
    num_bytes = num_rows * _padded(size) * dtype.itemsize
    to[:num_bytes].view(dtype).view(num_rows, -1)[:, :size].copy_(tensor)


def _padded(size: int) -> int:
    return -(-size // ROW_VALUES) * ROW_VALUES


def _bits(value: float) -> int:
    """A float32 in the lower half of a word."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
