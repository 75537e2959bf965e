"""What the machine can do: bytes read and multiplications made per second, by all threads together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.profile.loops import CHAINS, INTEGER_CHAINS, multiply, multiply_integers, read
from manyhats.engine.backends.cpu import wide
from manyhats.engine.backends.cpu.int16 import instructions


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second.

    Attributes:
        read_bytes: from memory.
        float32_flops: of fused multiply-adds, two each.
        int16_flops: of products of 16-bit integers and their sums, one each, as NF4 linears compute; None where the
            processor is slow at them.
    """

    read_bytes: float
    float32_flops: float
    int16_flops: float | None

    @property
    def flops(self) -> float:
        """The higher of the two."""
        return max(self.float32_flops, self.int16_flops or 0.0)


class RatesSession:
    """Lives in a worker process, so that its threads end before those of an engine begin.

    Args:
        num_threads: of every loop.
        buffer_bytes: read in one go; larger than the caches.
        seconds: of each measurement, at least.
    """

    def __init__(self, num_threads: int, buffer_bytes: int, seconds: float) -> None:
        self._num_threads = num_threads
        self._buffer = np.ones(buffer_bytes // (128 * num_threads) * 32 * num_threads, dtype=np.float32)
        self._seconds = seconds
        torch.set_num_threads(num_threads)

    def measure(self) -> Rates:
        """The best of several runs each: what a neighbour takes is not the machine's limit."""
        int16_flops = self.int16_flops() if instructions.has_instructions() else None
        return Rates(self._read_bytes(), self._float32_flops(), int16_flops)

    def _read_bytes(self) -> float:
        sums = np.zeros(self._num_threads, dtype=np.float32)
        return self._best(self._buffer.nbytes, lambda: read(self._buffer, sums, self._num_threads))

    def _float32_flops(self) -> float:
        count, start = 1_000_000, np.full(CHAINS * wide.LANES, 0.5, dtype=np.float32)
        sums = np.zeros(self._num_threads, dtype=np.float32)
        flops = 2.0 * CHAINS * wide.LANES * count * self._num_threads
        return self._best(flops, lambda: multiply(start, sums, count, self._num_threads))

    def int16_flops(self, count: int = 1_000_000) -> float:
        """Of the instructions of ``int16``, each product and each addition counted as one."""
        sums = np.zeros(self._num_threads, dtype=np.int32)
        flops = 4.0 * INTEGER_CHAINS * instructions.LANES * count * self._num_threads
        return self._best(flops, lambda: multiply_integers(sums, count, self._num_threads))

    def _best(self, amount: float, run: Callable[[], object]) -> float:
        run()  # compiles, or loads
        best_s, end_s = float("inf"), time.perf_counter() + self._seconds
        while time.perf_counter() < end_s:
            began_s = time.perf_counter()
            run()
            best_s = min(best_s, time.perf_counter() - began_s)
        return amount / best_s
