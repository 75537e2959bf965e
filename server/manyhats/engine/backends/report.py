"""What a backend can tell about the machine it would run on."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_CAPABILITY = (8, 0)
"""The first with tensor cores for bfloat16: Ampere's, of A100 and RTX 30."""


@dataclass(frozen=True, slots=True)
class KernelPath:
    """How one kind of work is computed.

    Attributes:
        work: such as the NF4 linears.
        path: the arithmetic and the instructions.
        is_slow: whether this is what is left where the processor has nothing better.
        faster: what would make it faster; empty if nothing is known to.
    """

    work: str
    path: str
    is_slow: bool = False
    faster: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorReport:
    """The processor, and how the kernels use it.

    Attributes:
        features: those of its vector instructions that kernels know, as vendors call them.
        num_threads: of the kernels.
        threads: the library that runs them: ``omp``, ``tbb`` or ``workqueue``.
    """

    features: tuple[str, ...]
    paths: tuple[KernelPath, ...]
    num_threads: int
    threads: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReport:
    """What torch sees of a GPU.

    Attributes:
        torch: its version.
        is_for_cuda: whether it is built for CUDA.
        name: of the card; empty if there is none, or no driver for it.
        capability: compute capability, such as (9, 0).
        num_bytes: of its memory.
    """

    torch: str
    is_for_cuda: bool
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    num_bytes: int = 0

    @property
    def problem(self) -> str:
        """Why nothing can run there, and what to do; empty if it can."""
        if not self.is_for_cuda:
            return f"torch {self.torch} is built without CUDA; install a build of torch for CUDA"
        if not self.name:
            return f"torch {self.torch} finds no GPU, or no driver for it; see what nvidia-smi says"
        if self.capability < LEAST_CAPABILITY:
            have, least = (".".join(map(str, each)) for each in (self.capability, LEAST_CAPABILITY))
            return f"{self.name} has compute capability {have}, and at least {least} is needed (A100, RTX 30 or later)"
        return ""
