"""What takes part, and what each is asked."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.measure import Sample
from benchmarks.workload import BASE_CASES, LORA_CASES, Case, Workload

ENVIRONMENTS = Path(__file__).parents[2] / ".peers"
"""A folder for each peer's programs; git ignores it."""
REQUIREMENTS = Path(__file__).parent / "requirements"

PREFILL = "prefill_tokens_per_s"
DECODE = "mean_decode_tokens_per_s"
"""By the mean time of a step: a peer that times all steps at once knows no median."""
ANSWERS = "answer_tokens_per_s"
PEAK = "peak_mib"

PROMPT_CASES = BASE_CASES
"""Prefill, and decoding behind it."""
ANSWER_CASES = (*BASE_CASES, LORA_CASES[1])
"""Whole answers through a server: of the base, and over eight LoRAs."""
DISTINCT = LORA_CASES[-1]
"""As many LoRAs as sequences."""
BUSY_CASES = (BASE_CASES[0], BASE_CASES[-1])
"""Decoded beside a process that keeps one processor busy."""


class PeerFailedError(Exception):
    """A peer's program failed, or said something unexpected; the text ends with what it said last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long prompts and answers are, beyond ``Settings``.

    Attributes:
        contexts: tokens of one prompt that is prefilled and decoded behind.
        answer_tokens: of a prompt that a server answers, and of its answer.
        answers: at least as many are timed together.
        memory_tokens: of prompt and answer together, while memory is watched.
    """

    contexts: tuple[int, ...] = (512, 2048, 4096)
    answer_tokens: int = 64
    answers: int = 16
    memory_tokens: int = 1024


QUICK_LENGTHS = Lengths(contexts=(64, 96), answer_tokens=8, answers=2, memory_tokens=48)
"""Enough to see that everything works."""


PARTS = ("process", "servers")
"""What can be measured alone: decoding and prefill in process, and whole answers and memory through servers."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What every peer needs to know: the model, its adapters, what is measured and how much of it."""

    workload: Workload
    lengths: Lengths
    parts: Collection[str] = PARTS


class Peer(Protocol):
    """One or several systems of one origin."""

    @property
    def name(self) -> str:
        """What ``--peers`` calls it."""
        ...

    def visit(self, index: int) -> Iterator[Sample]:
        """Everything of one round. What it starts, it has ended when the next peer's turn comes.

        Raises:
            PeerFailedError: it could not be measured.
        """
        ...


def context_case(num_tokens: int) -> str:
    """One prompt of so many tokens."""
    return f"context/{num_tokens}"


def busy_case(case: Case) -> str:
    """A case beside a busy process."""
    return f"busy {case.name}"


def answers_case(case: Case) -> str:
    """Whole answers on as many streams as the case has sequences."""
    return f"answers {case.name}"


MEMORY_CASE = f"memory {DISTINCT.name}"
