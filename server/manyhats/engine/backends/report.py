"""What a backend can tell about the machine it would run on."""

from __future__ import annotations

from dataclasses import dataclass


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
