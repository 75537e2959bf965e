"""The rows of the table: manyhats against each peer, with the goal where there is one."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.baselines import PEFT, TRANSFORMERS
from benchmarks.peers.llama_cpp import SERVER, system_name
from benchmarks.peers.llama_environment import FORMATS
from benchmarks.peers.peer import (
    ANSWER_CASES,
    ANSWERS,
    BUSY_CASES,
    DECODE,
    DISTINCT,
    MEMORY_CASE,
    PEAK,
    PREFILL,
    PROMPT_CASES,
    Lengths,
    answers_case,
    busy_case,
    context_case,
)
from benchmarks.row import Floor, Pick, Row, at_least, at_most
from benchmarks.workload import BASE_CASES, Case

PEER_OF: Mapping[str, str] = {
    **{system_name(model_format): "llama.cpp" for model_format in FORMATS},
    SERVER: "llama.cpp",
    "vllm": "vllm",
    TRANSFORMERS: "transformers",
    PEFT: "transformers",
}
"""A system → what ``--peers`` calls it; manyhats' own systems are not here."""
_FASTEST = system_name(FORMATS[0])
_TOKENS = "tokens/s"
_DECODE_GOALS = {1: at_least(1.3), 8: at_least(1.3), 32: at_least(1.5)}
_PREFILL_GOAL = at_least(1.3)
_ANSWER_GOALS = {
    (SERVER, 0): at_least(1.3),
    (SERVER, 8): at_least(6.0),
    ("vllm", 0): at_least(3.0),
    ("vllm", 8): at_least(10.0),
}
"""Of 32 streams: the peer, and over how many LoRAs."""


def make_rows(lengths: Lengths) -> list[Row]:
    """In the table's order."""
    return [
        *_prompt_rows(),
        *_context_rows(lengths),
        *_busy_rows(),
        *_answer_rows(),
        *_distinct_rows(),
        _ratio_row("memory", "peak, 32 sequences, a LoRA each", PEAK, MEMORY_CASE, "vllm", at_most(0.6)),
    ]


def _ratio_row(
    subject: str, what: str, figure: str, case: str, against: str, goal: Floor | None = None
) -> Row:
    """manyhats over a peer in one case."""
    ours = "engine" if subject in ("prompts", "context", "busy", "lora") else "grpc"
    return Row(
        subject=subject,
        title=f"{what}, against {against}",
        unit="MiB" if figure == PEAK else _TOKENS,
        ours=Pick(ours, case, figure),
        against=Pick(against, case, figure),
        judge="ratio",
        floor=goal,
    )


def _prompt_rows() -> list[Row]:
    rows = []
    for figure, what in ((PREFILL, "prefill"), (DECODE, "decode")):
        for peer in (*map(system_name, FORMATS), TRANSFORMERS):
            for case in PROMPT_CASES:
                goal = _PREFILL_GOAL if figure == PREFILL else _DECODE_GOALS[case.num_sequences]
                title = f"{what}, {_sequences(case)}"
                goal_here = goal if peer == _FASTEST else None
                rows.append(_ratio_row("prompts", title, figure, case.name, peer, goal_here))
    return rows


def _context_rows(lengths: Lengths) -> list[Row]:
    return [
        _ratio_row("context", f"{what} {num_tokens} tokens", figure, context_case(num_tokens), _FASTEST)
        for figure, what in ((PREFILL, "prefill of"), (DECODE, "decode behind"))
        for num_tokens in lengths.contexts
    ]


def _busy_rows() -> list[Row]:
    """Each against its own quiet rate, and manyhats against llama.cpp."""
    rows = []
    for case in BUSY_CASES:
        for system, goal in (("engine", at_least(0.45)), (_FASTEST, None)):
            rows.append(
                Row(
                    subject="busy",
                    title=f"decode beside a busy process, {_sequences(case)}, {system} against its quiet rate",
                    unit=_TOKENS,
                    ours=Pick(system, busy_case(case), DECODE),
                    against=Pick(system, case.name, DECODE),
                    judge="ratio",
                    floor=goal,
                )
            )
        title = f"decode beside a busy process, {_sequences(case)}"
        rows.append(_ratio_row("busy", title, DECODE, busy_case(case), _FASTEST))
    return rows


def _answer_rows() -> list[Row]:
    most = BASE_CASES[-1].num_sequences
    rows = []
    for peer in (SERVER, "vllm"):
        for case in ANSWER_CASES:
            goal = _ANSWER_GOALS[peer, case.num_adapters] if case.num_sequences == most else None
            rows.append(
                _ratio_row("answers", f"gRPC, {_streams(case)}", ANSWERS, answers_case(case), peer, goal)
            )
    for case in (*ANSWER_CASES, DISTINCT):
        rows.append(
            Row(
                subject="answers",
                title=f"HTTP, {_streams(case)}, against gRPC",
                unit=_TOKENS,
                ours=Pick("http", answers_case(case), ANSWERS),
                against=Pick("grpc", answers_case(case), ANSWERS),
                judge="ratio",
            )
        )
    return rows


def _distinct_rows() -> list[Row]:
    """Distinct LoRAs: against PEFT, and against the own base in process and through gRPC."""
    base = Case(DISTINCT.num_sequences)
    title = f"decode, {DISTINCT.num_sequences} over {DISTINCT.num_adapters} LoRAs"
    return [
        _ratio_row("lora", title, DECODE, DISTINCT.name, PEFT),
        Row(
            subject="lora",
            title=f"{title}, against the own base",
            unit=_TOKENS,
            ours=Pick("engine", DISTINCT.name, DECODE),
            against=Pick("engine", base.name, DECODE),
            judge="ratio",
            floor=at_least(0.75),
        ),
        Row(
            subject="lora",
            title=f"gRPC, {_streams(DISTINCT)}, against the own base",
            unit=_TOKENS,
            ours=Pick("grpc", answers_case(DISTINCT), ANSWERS),
            against=Pick("grpc", answers_case(base), ANSWERS),
            judge="ratio",
        ),
    ]


def _sequences(case: Case) -> str:
    return "1 sequence" if case.num_sequences == 1 else f"{case.num_sequences} sequences"


def _streams(case: Case) -> str:
    streams = "1 stream" if case.num_sequences == 1 else f"{case.num_sequences} streams"
    return streams if not case.num_adapters else f"{streams} over {case.num_adapters} LoRAs"
