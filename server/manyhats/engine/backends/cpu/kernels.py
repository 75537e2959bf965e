"""Programs run, and tokens chosen, on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.choosing import Logprobs
from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu import step
from manyhats.engine.backends.cpu.choosing.choosing import TokenChooser
from manyhats.engine.backends.cpu.choosing.logprobs import score
from manyhats.engine.backends.cpu.compile import max_threads
from manyhats.engine.backends.cpu.dense import instructions as dense
from manyhats.engine.backends.cpu.dense.packing import pack_groups, takes_groups
from manyhats.engine.backends.cpu.int16 import instructions
from manyhats.engine.backends.cpu.int16.packing import pack_for_int16, pack_int8, takes_int8, takes_int16
from manyhats.engine.backends.cpu.packing import (
    LANES,
    Array,
    CpuLinear,
    pack_linear,
)
from manyhats.engine.backends.cpu.program import Instructions, Program
from manyhats.engine.backends.wants import Choices
from manyhats.engine.errors import ModelError
from manyhats.engine.model.weights import Linear
from manyhats.engine.threads.processors import num_processors


class CpuKernels:
    """Runs programs and chooses tokens on a number of threads.

    Its only state is scratch memory, so one instance serves one forward at a time.

    Args:
        num_threads: None is one per core.
        is_exact: False lets NF4 linears run in 16-bit integers, and those in bfloat16 round their inputs to it, where
            the processor has instructions for it.

    Attributes:
        num_threads: of the kernels.
        uses_int16: whether NF4 linears do, and the head's unlikely logits are made so.
        uses_pairs: whether linears in bfloat16 multiply inputs in bfloat16.
        timed: None, or what each run appends its instructions to and, [instructions + 1] int64, the nanoseconds of a
            monotonic clock at its start and after each of them.
    """

    def __init__(self, num_threads: int | None = None, *, is_exact: bool = True) -> None:
        self.num_threads = min(num_threads or torch.get_num_threads(), max_threads())
        self.uses_int16 = not is_exact and instructions.has_instructions()
        self.uses_pairs = not is_exact and dense.has_pairs()
        numba.set_num_threads(self.num_threads)
        self._scratch = torch.empty((self.num_threads, 0))
        self._chooser = TokenChooser(self.num_threads)
        self._num_used = self.num_threads
        self.timed: list[tuple[Array, Array]] | None = None

    def start_thread(self) -> None:
        """Gives the calling thread this backend's number of threads, and other threads of the process one of torch's.

        Numba and torch both keep the number per thread, torch with the latest one set as the default of the others.
        A second team would make this one's threads sleep between loops (``in_own_thread``).
        """
        self._use_threads(self.num_threads)

    def _use_threads(self, count: int) -> None:
        self._num_used = count
        numba.set_num_threads(count)
        torch.set_num_threads(count)
        torch.get_num_threads()  # a thread takes the default over at its first look, and keeps its own from then on
        others = threading.Thread(target=torch.set_num_threads, args=(1,))
        others.start()
        others.join()

    def leave_processors(self, count: int) -> None:
        """Uses no more threads from now on than the processors left over can run, but at least one.

        Work is divided as before, so the numbers are the same.
        """
        num_used = max(min(self.num_threads, num_processors() - count), 1)
        if num_used != self._num_used:
            self._use_threads(num_used)

    def pack(self, parts: Sequence[Linear]) -> CpuLinear:
        """Lays out linears over the same input as one."""
        if takes_groups(parts):
            return pack_groups(parts, are_pairs=self.uses_pairs)
        return self._pack(parts)

    def _pack(self, parts: Sequence[Linear]) -> CpuLinear:
        """The same; a single dense matrix is read in place."""
        if self.uses_int16 and takes_int16(parts):
            return pack_for_int16(parts)
        return pack_linear(parts)

    def pack_head(self, head: Linear) -> tuple[CpuLinear, CpuLinear | None]:
        """Lays out an output head, and, if it may be used, the same in eight bits."""
        own = self._pack([head])
        return own, pack_int8(head) if self.uses_int16 and takes_int8(head) else None

    def linear(self, x: Tensor, packed: CpuLinear) -> Tensor:
        """``x Wᵀ + b``."""
        y = torch.empty((x.shape[0], packed.out_features))
        converted = torch.empty((x.shape[0], packed.converted_size))
        program = Program()
        program.linear(0, 1, packed, converted=2)
        self.run_alone(program, [x, y, converted])
        return y

    def softcap(self, x: Tensor, limit: float) -> None:
        """``x = limit · tanh(x / limit)``, in place.

        Raises:
            ModelError: the rows are shorter than a vector.
        """
        if x.shape[1] < LANES:
            raise ModelError(f"the CPU kernels cap rows of at least {LANES} values, not {x.shape[1]}")
        program = Program()
        program.softcap(0, x.shape[1], limit)
        self.run_alone(program, [x])

    def run_alone(self, program: Program, buffers: Sequence[Tensor]) -> None:
        """Runs a program on rows that belong to no step; the buffers are [N, …] float32."""
        frame = np.zeros(col.FRAME_SIZE, dtype=np.int64)
        frame[col.NUM_ROWS] = buffers[0].shape[0]
        self.run(program.arrays(), frame, buffers, None, program.num_scratch_values)

    def run(
        self,
        instructions: Instructions,
        frame: Array,
        buffers: Sequence[Tensor],
        dtypes: tuple[torch.dtype, torch.dtype] | None,
        num_scratch_values: int,
    ) -> None:
        """Runs instructions.

        Args:
            instructions: all or some of a program's.
            frame: the step's; the call's columns are filled in here.
            buffers: by number.
            dtypes: of the cache, and of adapters; None if no instruction reads either.
            num_scratch_values: float32 values, on each thread.
        """
        if self._scratch.shape[1] < num_scratch_values:
            # Whole cache lines for each thread, as torch's memory begins with one.
            size = -(-num_scratch_values // 16) * 16
            self._scratch = torch.empty((self.num_threads, size))
        rows, numbers = instructions
        addresses = np.array([buffer.data_ptr() for buffer in buffers], dtype=np.int64)
        counters = np.zeros((2, len(rows)), dtype=np.int64)
        frame[col.NUM_THREADS] = self._num_used
        frame[col.NUM_INSTRUCTIONS] = len(rows)
        frame[col.INSTRUCTIONS] = rows.ctypes.data
        frame[col.NUMBERS] = numbers.ctypes.data
        frame[col.BUFFERS] = addresses.ctypes.data
        frame[col.COUNTERS] = counters.ctypes.data
        frame[col.SCRATCH] = self._scratch.data_ptr()
        frame[col.SCRATCH_SIZE] = self._scratch.shape[1]
        times = None if self.timed is None else np.zeros((len(rows) + 1, 2), dtype=np.int64)
        frame[col.TIMES] = 0 if times is None else times.ctypes.data
        shares = step.addresses_of_shares(dtypes and (dtypes[0].itemsize, dtypes[1].itemsize))
        frame[col.PLAIN_SHARE : col.PLAIN_SHARE + len(shares)] = shares
        step.run(frame.ctypes.data, self._num_used)
        if self.timed is not None and times is not None:
            self.timed.append((rows, times[:, 0] * 1_000_000_000 + times[:, 1]))

    def choose(self, logits: Tensor, choices: Choices) -> Tensor:
        """One token for each row."""
        return self._chooser.choose(logits, choices)

    def logprobs(self, logits: Tensor, rows: Tensor, targets: Tensor, num_top: int) -> Logprobs:
        """Log-probabilities of targets, with ranks, and each row's most likely tokens."""
        num_rows, num_pairs = logits.shape[0], targets.shape[0]
        found = Logprobs(
            np.empty(num_pairs),
            np.empty(num_pairs, dtype=np.int64),
            np.empty((num_rows, num_top), dtype=np.int64),
            np.empty((num_rows, num_top)),
        )
        score(
            logits.contiguous().numpy(),
            rows.numpy(),
            targets.numpy(),
            found.logprobs,
            found.ranks,
            found.top_ids,
            found.top_logprobs,
            np.empty(num_rows),
            min(self.num_threads, max(num_rows, num_pairs)),
        )
        return found
