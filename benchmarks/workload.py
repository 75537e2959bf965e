"""What is measured: the cases, how long and how often, on which model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

Method = Literal["lora", "bottleneck", "prefix", "prompt"]
MIXED: tuple[Method, ...] = ("lora", "bottleneck", "prefix", "prompt")


@dataclass(frozen=True, slots=True, order=True)
class Adapter:
    """One adapter of a method; ``index`` tells it from others."""

    method: Method
    index: int

    @property
    def name(self) -> str:
        """Of its directory, and of its task."""
        return f"{self.method}{self.index}"

    @property
    def is_virtual(self) -> bool:
        """Whether it has virtual tokens."""
        return self.method in ("prefix", "prompt")


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """A number of sequences at once, over a number of distinct adapters of one or several methods; 0 is the base.

    At their first decode step all have a context of the same length, virtual tokens included.
    """

    num_sequences: int
    num_adapters: int = 0
    methods: tuple[Method, ...] = ("lora",)

    @property
    def name(self) -> str:
        """``base/32``, ``lora/32x8`` or ``mixed/32x32``."""
        if not self.num_adapters:
            return f"base/{self.num_sequences}"
        what = self.methods[0] if len(self.methods) == 1 else "mixed"
        return f"{what}/{self.num_sequences}x{self.num_adapters}"

    def adapter_of(self, row: int) -> Adapter | None:
        """Which adapter a sequence has; None is the base."""
        if not self.num_adapters:
            return None
        index = row % self.num_adapters
        return Adapter(self.methods[index % len(self.methods)], index // len(self.methods))

    @property
    def adapters(self) -> frozenset[Adapter]:
        """All of them."""
        found = (self.adapter_of(row) for row in range(self.num_sequences))
        return frozenset(adapter for adapter in found if adapter is not None)


BASE_CASES = (Case(1), Case(8), Case(32))
LORA_CASES = (Case(32, 1), Case(32, 8), Case(32, 32))
MIXED_CASE = Case(32, 32, MIXED)
VIRTUAL_CASES = tuple(
    Case(num_sequences, 1, (method,))
    for method in MIXED
    if method in ("prefix", "prompt")
    for num_sequences in (1, 32)
)
HELD_COUNTS = (1, 100)
"""Requests of one prompt tuning task at once, whose virtual tokens' blocks are counted."""
REGISTERED = tuple(Adapter("lora", index) for index in range(20))
"""What is registered beside running streams."""
SHARED = Adapter("lora", len(REGISTERED))
"""What very many tasks are all made of; of those that do not fit in memory, its copies."""


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
        virtual_tokens: of each prefix and prompt.
        num_tasks: in the store that has very many.
        lookups: of one of them, timed.
        registrations: beside running streams; half of them uploads.
        undisturbed_s: how long those streams decode before.
        num_loras: tasks of which each has a LoRA of its own.
        in_memory, in_slots: how many of them fit there.
        cold_at_once: of these, asked at the same moment.
        zipf_callers, zipf_requests: callers at a time, and their requests in total, of tasks by Zipf's law.
        beside_requests: one a second beside streams.
        cold_starts: timed, for each place where an adapter may be.
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
    virtual_tokens: int = 32
    num_tasks: int = 10_000
    lookups: int = 200
    registrations: int = len(REGISTERED)
    undisturbed_s: float = 5.0
    num_loras: int = 500
    in_memory: int = 100
    in_slots: int = 32
    cold_at_once: int = 300
    zipf_callers: int = 32
    zipf_requests: int = 480
    beside_requests: int = 10
    cold_starts: int = 20


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
        virtual_tokens=16,
        num_tasks=200,
        lookups=20,
        registrations=4,
        undisturbed_s=0.5,
        num_loras=24,
        in_memory=16,
        in_slots=10,
        cold_at_once=16,
        zipf_callers=4,
        zipf_requests=24,
        beside_requests=1,
        cold_starts=2,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Everything a worker process needs to know.

    Attributes:
        model: as given to ``manyhats serve --model``.
        directory: its Hugging Face directory.
        linear_parameters: of all linears that are kept in NF4.
        adapters: their directories.
        scratch: a directory that goes when the benchmark ends.
    """

    settings: Settings
    model: str
    directory: Path
    vocab_size: int
    linear_parameters: int
    scratch: Path
    adapters: Mapping[Adapter, Path] = field(default_factory=lambda: MappingProxyType({}))

    def prompts(self, case: Case, seed: int, num_tokens: int | None = None) -> list[list[int]]:
        """Random token ids, another prompt for each sequence and seed; special tokens, the first ids, left out.

        Of ``num_tokens`` (or ``settings.prompt_tokens``) each, less the sequence's virtual tokens.
        """
        source = random.Random(f"{case.name} {seed}")
        first, length = self.vocab_size // 8, num_tokens or self.settings.prompt_tokens
        return [
            [source.randrange(first, self.vocab_size) for _ in range(length - self._num_virtual(case, row))]
            for row in range(case.num_sequences)
        ]

    def _num_virtual(self, case: Case, row: int) -> int:
        adapter = case.adapter_of(row)
        return self.settings.virtual_tokens if adapter is not None and adapter.is_virtual else 0
