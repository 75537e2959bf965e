"""What training is measured on: rows of random tokens, how many, how long, and what of them is learned."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

FLOOR = 1.2
"""Tokens per second over those of PEFT and transformers' Trainer."""


@dataclass(frozen=True, slots=True)
class TrainingCase:
    """One kind of training.

    Attributes:
        lengths: of the rows in tokens: the shortest and the longest.
        learned_share: of each row's tokens, from its end; 1 is a plain text.
        checkpointing: whether activations are computed again in the backward pass.
    """

    name: str
    title: str
    lengths: tuple[int, int]
    learned_share: float = 1.0
    checkpointing: bool = False


CASES = (
    TrainingCase("equal", "rows of 128 tokens", (128, 128)),
    TrainingCase("mixed", "rows of 32 to 224 tokens", (32, 224)),
    TrainingCase("completion", "rows of 32 to 224 tokens, a quarter learned", (32, 224), 0.25),
    TrainingCase("checkpointing", "rows of 128 tokens, gradient checkpointing", (128, 128), 1.0, True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingWorkload:
    """Everything a worker process needs to know.

    Attributes:
        steps: timed in one run, behind one that is not.
        batch_size: rows of a step.
        rank: of the LoRA, on all linears of the layers.
        longest: no row has more tokens.
    """

    model: str
    directory: Path
    vocab_size: int
    threads: int
    rounds: int = 3
    steps: int = 5
    probe_steps: int = 1
    batch_size: int = 16
    rank: int = 16
    alpha: float = 32.0
    learning_rate: float = 2e-4
    longest: int = 4096
    quiet_check_s: float = 2.0

    def rows(self, case: TrainingCase, seed: int, steps: int) -> list[tuple[list[int], int]]:
        """The rows of so many steps and one more: token ids, and how many of the first are not learned."""
        source = random.Random(f"{case.name} {seed}")
        first = self.vocab_size // 8
        rows = []
        for _ in range(self.batch_size * (steps + 1)):
            length = min(self.longest, source.randint(*case.lengths))
            ids = [source.randrange(first, self.vocab_size) for _ in range(length)]
            rows.append((ids, max(1, length - round(length * case.learned_share))))
        return rows


def tokens_per_s(tokens: list[int], times_s: list[float]) -> float:
    """Of all steps but the first, which warms up."""
    return sum(tokens[1:]) / sum(times_s[1:])
