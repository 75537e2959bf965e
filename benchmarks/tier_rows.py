"""The rows about many more tasks than fit in memory."""

from __future__ import annotations

from benchmarks.row import Floor, Judge, Pick, Row, at_least, at_most

COLD_CASE, BESIDE_CASE, STARTS_CASE = "tiers/cold", "tiers/beside", "tiers/starts"
"""In which tasks are cold at once, beside streams, and one after the other."""


def zipf_name(num_tasks: int) -> str:
    """The case in which so many tasks are asked by Zipf's law."""
    return f"tiers/zipf/{num_tasks}"


def tier_rows() -> list[Row]:
    """Those of throughput, of many cold tasks at once, and of what a cold task costs others and itself."""
    return [
        _row(
            "32 callers over 500 LoRA by Zipf's law, 100 in memory, 32 slots, against one LoRA",
            "tokens/s",
            _pick(zipf_name(500), "tokens_per_s"),
            at_least(0.7),
            _pick(zipf_name(1), "tokens_per_s"),
            "ratio",
        ),
        _row("300 cold tasks at once, answered", "requests", _pick(COLD_CASE, "answered"), at_least(300)),
        _row(
            "the last first token, over a straight line through the median's",
            "×",
            _pick(COLD_CASE, "last_over_linear"),
            at_most(1.2),
        ),
        _row(
            "p99 between tokens of 8 streams beside a cold task a second, against a loaded one",
            "ms",
            _pick(BESIDE_CASE, "cold_p99_ms"),
            at_most(1.2),
            _pick(BESIDE_CASE, "warm_p99_ms"),
            "ratio",
        ),
        *(
            _row(
                f"first token, adapter {where}, over one in a slot",
                "ms",
                _pick(STARTS_CASE, figure),
                at_most(most),
                _pick(STARTS_CASE, "device_ms"),
                "difference",
            )
            for where, figure, most in (("in memory", "host_ms", 10), ("on disk", "disk_ms", 60))
        ),
    ]


def _pick(case: str, figure: str) -> Pick:
    return Pick("server", case, figure)


def _row(
    title: str, unit: str, ours: Pick, floor: Floor, against: Pick | None = None, judge: Judge = "value"
) -> Row:
    return Row(subject="tiers", title=title, unit=unit, ours=ours, against=against, judge=judge, floor=floor)
