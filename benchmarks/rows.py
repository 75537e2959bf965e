"""The rows of the table: whose figure, against whose, and the floor. A new subject adds its rows here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.workload import BASE_CASES, LORA_CASES, Case

Judge = Literal["value", "ratio", "percent over"]
"""What is held against the floor: the figure; it over the other's; or by how many percent it exceeds that."""


@dataclass(frozen=True, slots=True)
class Pick:
    """A figure of one system in one case; of several variants, the one with the highest median is taken."""

    system: str
    case: str
    figure: str


BUSY = Pick("machine", "busy", "busy_cores")
"""Not a row: what else ran, taken while all systems were idle."""


@dataclass(frozen=True, slots=True)
class Floor:
    """What must be reached.

    Attributes:
        plausible_from: a figure below it shows a disturbed measurement, not a good result.
    """

    bound: Literal["at least", "at most"]
    value: float
    plausible_from: float | None = None

    def is_met(self, value: float) -> bool:
        """Whether a figure reaches it."""
        return value >= self.value if self.bound == "at least" else value <= self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; ``subject`` is what ``--only`` names."""

    subject: str
    title: str
    unit: str
    ours: Pick
    against: Pick | None = None
    judge: Judge = "value"
    floor: Floor | None = None

    @property
    def is_timed(self) -> bool:
        """Whether what else the machine does can change it."""
        return self.subject != "memory"


def at_least(value: float) -> Floor:
    """A lower bound."""
    return Floor("at least", value)


def at_most(value: float, plausible_from: float | None = None) -> Floor:
    """An upper bound."""
    return Floor("at most", value, plausible_from)


_TOKENS = "tokens/s"


def _count(case: Case, what: str) -> str:
    return f"{case.num_sequences} {what}{'' if case.num_sequences == 1 else 's'}"


def _base_rows() -> list[Row]:
    floors = {1: at_least(1.6), 32: at_least(1.4)}
    rows = []
    for phase in ("prefill", "decode"):
        for case in BASE_CASES:
            figure = f"{phase}_tokens_per_s"
            rows.append(
                Row(
                    subject="base",
                    title=f"{phase}, {_count(case, 'sequence')}",
                    unit=_TOKENS,
                    ours=Pick("engine", case.name, figure),
                    against=Pick("transformers", case.name, figure),
                    judge="ratio",
                    floor=floors.get(case.num_sequences) if phase == "decode" else None,
                )
            )
    return rows


def _lora_row(case: Case, phase: str, against: Pick, floor: Floor | None) -> Row:
    whose = "PEFT" if against.system == "peft" else "own base"
    return Row(
        subject="lora",
        title=f"{phase}, {case.num_sequences} over {case.num_adapters} LoRA, against {whose}",
        unit=_TOKENS,
        ours=Pick("engine", case.name, against.figure),
        against=against,
        judge="ratio",
        floor=floor,
    )


def _lora_rows() -> list[Row]:
    rows = []
    for phase in ("prefill", "decode"):
        figure = f"{phase}_tokens_per_s"
        for case in LORA_CASES:
            is_judged = phase == "decode" and case.num_adapters == 32
            base = Pick("engine", Case(case.num_sequences).name, figure)
            peft = Pick("peft", case.name, figure)
            rows.append(_lora_row(case, phase, peft, at_least(6.0) if is_judged else None))
            rows.append(_lora_row(case, phase, base, at_least(0.75) if is_judged else None))
    return rows


def _grpc_row(case: Case, title: str, unit: str, figure: str) -> Row:
    return Row(
        subject="grpc",
        title=f"{title}, {_count(case, 'stream')}",
        unit=unit,
        ours=Pick("grpc", case.name, figure),
    )


def _grpc_rows() -> list[Row]:
    rows = [_grpc_row(case, "decode", _TOKENS, "decode_tokens_per_s") for case in BASE_CASES]
    rows.append(_grpc_row(LORA_CASES[-1], "decode over 32 LoRA", _TOKENS, "decode_tokens_per_s"))
    for figure, title in (("first_token", "time to first token"), ("inter_token", "between tokens")):
        for case in BASE_CASES:
            for percent in ("p50", "p99"):
                rows.append(_grpc_row(case, f"{title} {percent}", "ms", f"{figure}_{percent}_ms"))
    most = BASE_CASES[-1]
    for figure, title, floor in (
        ("step_ms", "cost over the engine's own step", at_most(10.0, plausible_from=-5.0)),
        ("mean_step_ms", "cost over its mean step", None),
    ):
        rows.append(
            Row(
                subject="grpc",
                title=f"{title}, {_count(most, 'stream')}",
                unit="ms/step",
                ours=Pick("grpc", most.name, figure),
                against=Pick("engine", most.name, figure),
                judge="percent over",
                floor=floor,
            )
        )
    return rows


def _server_row(subject: str, title: str, unit: str, figure: str, floor: Floor | None = None) -> Row:
    return Row(subject=subject, title=title, unit=unit, ours=Pick("server", subject, figure), floor=floor)


_SERVER_ROWS = [
    _server_row("memory", "base linears, NF4", "bytes/parameter", "base_bytes_per_parameter", at_most(0.54)),
    _server_row("memory", "base linears", "MiB", "base_mib"),
    _server_row("memory", "embedding, head and norms", "MiB", "embeddings_mib"),
    _server_row("memory", "32 LoRA", "MiB", "adapters_mib"),
    _server_row("memory", "KV cache", "MiB", "kv_mib"),
    _server_row("memory", "peak resident set of the server", "MiB", "peak_rss_mib"),
    _server_row("start", "second start, process to ready", "s", "ready_s", at_most(8.0)),
]

ROWS: tuple[Row, ...] = (*_base_rows(), *_lora_rows(), *_grpc_rows(), *_SERVER_ROWS)
"""In the table's order."""

SUBJECTS: tuple[str, ...] = tuple(dict.fromkeys(row.subject for row in ROWS))
"""What ``--only`` can name."""
