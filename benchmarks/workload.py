"""What is measured: the cases, how long and how often, on which model."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """A number of sequences of equal length at once, over a number of distinct adapters; 0 is the base alone."""

    num_sequences: int
    num_adapters: int = 0

    @property
    def name(self) -> str:
        """``base/32`` or ``lora/32x8``."""
        if self.num_adapters:
            return f"lora/{self.num_sequences}x{self.num_adapters}"
        return f"base/{self.num_sequences}"

    def adapter_of(self, row: int) -> int | None:
        """Which adapter a sequence has; None is the base."""
        return row % self.num_adapters if self.num_adapters else None


BASE_CASES = (Case(1), Case(8), Case(32))
LORA_CASES = (Case(32, 1), Case(32, 8), Case(32, 32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured.

    Attributes:
        threads: of every system.
        rounds: times every system runs every case, one after the other.
        prompt_tokens: context before the first decode step.
        decode_steps: timed in one run.
        min_decode_steps, run_limit_s: a slow baseline decodes fewer steps, to stay near the limit.
        probe_tokens: prompt length of the short runs that choose a baseline's dtype.
        first_token_requests: at least as many times to first token in one run.
        starts: of the server, after one that fills the caches.
        quiet_check_s: how long the machine is watched, before each round and after the last.
        adapter_rank: of each LoRA; it acts on all linears.
    """

    threads: int
    rounds: int = 3
    prompt_tokens: int = 128
    decode_steps: int = 32
    min_decode_steps: int = 8
    run_limit_s: float = 20.0
    probe_tokens: int = 4
    first_token_requests: int = 8
    starts: int = 5
    quiet_check_s: float = 2.0
    adapter_rank: int = 16


def quick_settings(threads: int) -> Settings:
    """Enough to see that everything works; the figures mean little."""
    return Settings(
        threads=threads,
        rounds=1,
        prompt_tokens=32,
        decode_steps=8,
        min_decode_steps=4,
        run_limit_s=2.0,
        first_token_requests=2,
        starts=1,
        quiet_check_s=0.3,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Everything a worker process needs to know.

    Attributes:
        model: as given to ``manyhats serve --model``.
        directory: its Hugging Face directory.
        linear_parameters: of all linears that are kept in NF4.
        adapters: PEFT directories, one per adapter.
        scratch: a directory that goes when the benchmark ends.
    """

    settings: Settings
    model: str
    directory: Path
    vocab_size: int
    linear_parameters: int
    scratch: Path
    adapters: tuple[Path, ...] = field(default=())

    def prompts(self, case: Case, seed: int, num_tokens: int | None = None) -> list[list[int]]:
        """Random token ids, another prompt for each sequence and seed; special tokens, the first ids, left out."""
        source = random.Random(f"{case.name} {seed}")
        first, length = self.vocab_size // 8, num_tokens or self.settings.prompt_tokens
        return [
            [source.randrange(first, self.vocab_size) for _ in range(length)]
            for _ in range(case.num_sequences)
        ]
