"""The rows of the table: whose figure, against whose, and the floor. A new subject adds its rows here."""

from __future__ import annotations

from benchmarks.row import Floor, Pick, Row, at_least, at_most
from benchmarks.tier_rows import tier_rows
from benchmarks.workload import (
    BASE_CASES,
    HELD_COUNTS,
    LORA_CASES,
    MIXED_CASE,
    VIRTUAL_CASES,
    Case,
)

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


def _method_rows() -> list[Row]:
    """Mixed methods, and virtual tokens, against base rows whose context has the same length."""
    figure = "decode_tokens_per_s"
    rows = [
        Row(
            subject="methods",
            title="decode, 8 LoRA + 8 bottleneck + 8 prefix + 8 prompt, all distinct, against own base",
            unit=_TOKENS,
            ours=Pick("engine", MIXED_CASE.name, figure),
            against=Pick("engine", Case(MIXED_CASE.num_sequences).name, figure),
            judge="ratio",
            floor=at_least(0.75),
        )
    ]
    rows += [
        Row(
            subject="methods",
            title=f"step of a {case.methods[0]} task over the base's, {_count(case, 'sequence')}",
            unit="ms/step",
            ours=Pick("engine", case.name, "step_ms"),
            against=Pick("engine", Case(case.num_sequences).name, "step_ms"),
            judge="percent over",
            floor=at_most(5.0, plausible_from=-5.0),
        )
        for case in VIRTUAL_CASES
    ]
    one, many = HELD_COUNTS
    held = Row(
        subject="methods",
        title=f"held for virtual tokens, {many} requests of a prompt task, against {one}",
        unit="blocks",
        ours=Pick("engine", held_name(many), "held_blocks"),
        against=Pick("engine", held_name(one), "held_blocks"),
        judge="ratio",
        floor=at_most(1.0),
    )
    return [*rows, held]


def held_name(num_requests: int) -> str:
    """The case in which blocks of virtual tokens are counted."""
    return f"held/{num_requests}"


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


def _store_rows() -> list[Row]:
    many, none = START_CASES
    rows = [
        Row(
            subject="store",
            title="start with 10,000 tasks, over one with none",
            unit="s",
            ours=Pick("server", many, "ready_s"),
            against=Pick("server", none, "ready_s"),
            judge="difference",
            floor=at_most(1.0),
        ),
        Row(
            subject="store",
            title="look-up of one of 10,000 tasks, the whole call",
            unit="ms",
            ours=Pick("server", LOOKUP_CASE, "lookup_ms"),
            floor=at_most(1.0),
        ),
        Row(
            subject="store",
            title="page of 100 of 10,000 tasks",
            unit="ms",
            ours=Pick("server", LOOKUP_CASE, "page_ms"),
            floor=at_most(20.0),
        ),
    ]
    return rows + [row for case in BASE_CASES for row in _registration_rows(case)]


def _registration_rows(case: Case) -> list[Row]:
    """10 MB: a LoRA of rank 16 on all linears of the default model."""
    name, beside = registration_name(case), _count(case, "stream")
    rows = [
        Row(
            subject="store",
            title=f"10 MB {what} to active, beside {beside}",
            unit="s",
            ours=Pick("server", name, figure),
            floor=floor,
        )
        for what, figure, floor in (
            ("registered", "path_s", at_most(0.5)),
            ("uploaded", "upload_s", at_most(0.5)),
            ("at the slowest", "slowest_s", None),
        )
    ]
    rows.append(
        Row(
            subject="store",
            title=f"largest gap meanwhile, against before, {beside}",
            unit="medians",
            ours=Pick("server", name, "beside_largest_gap"),
            against=Pick("server", name, "alone_largest_gap"),
            floor=at_most(2.0),
        )
    )
    rows.append(
        Row(
            subject="store",
            title=f"between tokens p99 meanwhile, over before, {beside}",
            unit="ms",
            ours=Pick("server", name, "beside_p99_ms"),
            against=Pick("server", name, "alone_p99_ms"),
            judge="percent over",
        )
    )
    return rows


def encoding_name(form: str) -> str:
    """The case in which an encoder runs in some form."""
    return f"encode/{form}"


def _encoder_row(
    figure: str, title: str, form: str, against: str, against_form: str, floor: Floor | None = None
) -> Row:
    library = "PEFT" if against == "peft" else against
    return Row(
        subject="encoders",
        title=f"{title}, {form}, against {library} in {against_form}",
        unit="texts/s",
        ours=Pick("engine", encoding_name(form), figure),
        against=Pick(against, encoding_name(against_form), figure),
        judge="ratio",
        floor=floor,
    )


def _encoder_rows() -> list[Row]:
    base = "base_texts_per_s", "32 texts of 64 tokens"
    tasks = "tasks_texts_per_s", "32 texts over 8 LoRA"
    return [
        _encoder_row(*base, "float32", "transformers", "float32", at_least(1.0)),
        _encoder_row(*base, "bfloat16", "transformers", "bfloat16", at_least(1.0)),
        _encoder_row(*base, "nf4", "transformers", "bfloat16"),
        _encoder_row(*tasks, "float32", "peft", "float32"),
        _encoder_row(*tasks, "bfloat16", "peft", "float32", at_least(4.0)),
        _encoder_row(*tasks, "bfloat16", "peft", "bfloat16"),
        _encoder_row(*tasks, "nf4", "peft", "float32"),
    ]


START_CASES = ("start/many", "start/none")
"""In which the store has very many tasks, and in which it has none."""
LOOKUP_CASE = "lookup"


def registration_name(case: Case) -> str:
    """The case in which adapters are registered beside these streams."""
    return f"registration/{case.num_sequences}"


ROWS: tuple[Row, ...] = (
    *_base_rows(),
    *_lora_rows(),
    *_method_rows(),
    *_grpc_rows(),
    *_SERVER_ROWS,
    *_store_rows(),
    *_encoder_rows(),
    *tier_rows(),
)
"""In the table's order."""

SUBJECTS: tuple[str, ...] = tuple(dict.fromkeys(row.subject for row in ROWS))
"""What ``--only`` can name."""
