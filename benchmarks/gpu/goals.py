"""What a GPU has to reach, and what a run found of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Literal

from benchmarks.gpu.record import Figures, Found

Bound = Literal["at least", "at most"]
Run = Mapping[str, Found]
"""What the parts found, by their names."""
Measure = Callable[[Run], float | None]
"""A figure; None if something that it follows from is missing."""

NOT_MEASURED = "not measured"
_LARGE_CARD_GB = 40
"""Of memory; smaller ones have less bandwidth for the same arithmetic, and must come nearer to it."""
_FEW_ROWS = (1, 4, 8, 16, 32, 64)
_MANY_ROWS = (512, 2048)
_ENGINE = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Goal:
    """A line of the table.

    Attributes:
        title: what is measured.
        measure: how.
        must: what has to be reached.
        want: what would be good.
        bound: of both.
        unit: that follows figures.
        small: must and want of cards with little memory; empty for the same.
    """

    title: str
    measure: Measure
    must: float
    want: float
    bound: Bound = "at least"
    unit: str = "x"
    small: tuple[float, float] | tuple[()] = ()

    def bounds(self, run: Run) -> tuple[float, float]:
        """Must and want of the card."""
        memory = _part(run, "0").first("card", "memory_gb")
        is_small = memory is not None and memory < _LARGE_CARD_GB
        return self.small if self.small and is_small else (self.must, self.want)

    def verdict(self, run: Run, value: float | None) -> str:
        """On a figure."""
        if value is None or math.isnan(value):
            return NOT_MEASURED
        must, want = self.bounds(run)
        sign = 1 if self.bound == "at least" else -1
        if sign * value >= sign * want:
            return "wanted"
        return "ok" if sign * value >= sign * must else "MISSED"


def _part(run: Run, name: str) -> Found:
    return run.get(name, Found(name))


def _fastest(run: Run, rows: int, shape: Sequence[int]) -> float | None:
    """Microseconds of the fastest configuration whose bits hold, absmaxes nested, or decoded first."""
    wrong = {tuple(each["candidate"]) for each in _part(run, "B").of("bits", holds=False)}
    part = _part(run, "C")
    kinds = [*part.of("nf4", rows=rows, absmax="nested"), *part.of("decoded first", rows=rows)]
    times = [
        each["us"] for each in kinds if each["shape"] == list(shape) and tuple(each["candidate"]) not in wrong
    ]
    return min(times, default=None)


def _shapes(run: Run) -> list[list[int]]:
    shapes: list[list[int]] = []
    for each in _part(run, "C").of("nf4"):
        if each["shape"] not in shapes:
            shapes.append(each["shape"])
    return shapes


def _bandwidth(run: Run) -> float | None:
    """Of one row over the engine's shapes, over a copy's."""
    copy = _part(run, "0").first("copy", "gb_per_s")
    # The engine's own shapes come first.
    shapes = _shapes(run)[: len(_ENGINE)]
    times = [_fastest(run, 1, shape) for shape in shapes]
    found = [each for each in times if each is not None]
    if copy is None or not found or len(found) < len(shapes):
        return None
    num_bytes = sum(n * k * (0.5 + 1 / 64 + 4 / (64 * 256)) for n, k in shapes)
    return num_bytes / (sum(found) * 1e-6) / 1e9 / copy


def _against(peer: str, rows: Sequence[int]) -> Measure:
    """How many times as fast as a peer, as a geometric mean over shapes and numbers of rows."""

    def measure(run: Run) -> float | None:
        ratios = []
        for each in _part(run, "C").of(peer):
            own = _fastest(run, each["rows"], each["shape"])
            if each["rows"] in rows and own is not None:
                ratios.append(each["us"] / own)
        return geometric_mean(ratios) if ratios else None

    return measure


def _decode(run: Run, rows: int, adapters: int = 0, on: str = "strict") -> float | None:
    """Tokens a second."""
    return _part(run, "E").first("decode", "tokens_per_s", on=on, rows=rows, adapters=adapters)


def _over(own: float | None, other: float | None) -> float | None:
    return None if own is None or not other else own / other


def _against_transformers(rows: int) -> Measure:
    return lambda run: _over(
        _decode(run, rows), _part(run, "F").first("transformers", "tokens_per_s", rows=rows)
    )


def _against_peft(run: Run) -> float | None:
    return _over(_decode(run, 32, 32), _part(run, "F").first("peft, switched", "tokens_per_s"))


def _adapters(count: int) -> Measure:
    """(with adapters / without) over the same ratio of the bytes that must be read."""

    def measure(run: Run) -> float | None:
        rows = max(32, count)
        ratio = _over(_decode(run, rows, count), _decode(run, rows))
        model = _part(run, "E").of("model")
        if ratio is None or not model:
            return None
        base = model[0]["step_bytes"] + rows * model[0]["context"] * model[0]["kv_bytes_per_token"]
        return ratio * float((base + count * model[0]["adapter_bytes"]) / base)

    return measure


def _loaded(run: Run) -> float | None:
    """Rows of the base with adapters in memory, over the same without."""
    found = _part(run, "E").of("base rows", on="strict")
    by_count = sorted(found, key=_num_loaded)
    if len(by_count) < 2:
        return None
    return _over(by_count[-1]["tokens_per_s"], by_count[0]["tokens_per_s"])


def _num_loaded(figures: Figures) -> int:
    return int(figures["loaded"])


def _host_share(run: Run) -> float | None:
    share = _part(run, "E").first("decode", "host_share", on="strict", rows=32, adapters=0)
    return None if share is None else 100 * share


def _cold(run: Run) -> float | None:
    return _part(run, "G").first("cold adapter", "median_ms")


def _strict_cost(run: Run) -> float | None:
    """By how many percent prompts and decodes take longer than on the libraries; the larger of both."""
    costs = []
    for what, of in (("prefill", {"length": 2048}), ("decode", {"rows": 32, "adapters": 0})):
        strict = _part(run, "E").first(what, "tokens_per_s", on="strict", **of)
        fast = _part(run, "E").first(what, "tokens_per_s", on="fast", **of)
        if strict and fast:
            costs.append(100 * (fast / strict - 1))
    return max(costs) if len(costs) == 2 else None


def _nothing(run: Run) -> None:
    """No part measures it."""


GOALS = (
    Goal("NF4 linears, 1 row: bandwidth over a copy's", _bandwidth, 0.55, 0.70, small=(0.75, 0.85)),
    Goal("NF4 linears over gemm_4bit, rows 1 to 64", _against("gemm_4bit", _FEW_ROWS), 1.0, 1.3),
    Goal(
        "NF4 linears over dequantize + mm, rows 512, 2048",
        _against("dequantize + mm", _MANY_ROWS),
        0.80,
        0.95,
    ),
    Goal("decode, 1 row, over transformers + bitsandbytes", _against_transformers(1), 4, 8),
    Goal("decode, 8 rows, the same", _against_transformers(8), 6, 12),
    Goal("decode, 32 rows, the same", _against_transformers(32), 8, 15),
    Goal("decode, 32 rows on 32 adapters, over PEFT switched", _against_peft, 10, 25),
    *(
        Goal(
            f"decode on {count} adapter{'s' * (count > 1)} / on none, over the bytes' ratio",
            _adapters(count),
            0.85,
            0.95,
        )
        for count in (1, 8, 32, 64)
    ),
    Goal("base rows with adapters loaded / without", _loaded, 0.98, 1.0),
    Goal("a step's wait for the host, 32 rows", _host_share, 10, 3, "at most", "%"),
    Goal("a cold adapter, from the host to its slot", _cold, 10, 4, "at most", " ms"),
    Goal("strict, what it costs over fast", _strict_cost, 15, 5, "at most", "%"),
    Goal("vLLM + bitsandbytes + LoRA, 32 adapters", _nothing, 1.0, 1.5),
)


def table(run: Run, *, is_measured: bool) -> str:
    """A line for each goal, and what else the parts say.

    Args:
        run: what they found.
        is_measured: whether their times mean anything.
    """
    lines = [("", "measured", "must", "want", "")]
    for goal in GOALS:
        value = goal.measure(run) if is_measured else None
        sign = "≥" if goal.bound == "at least" else "≤"
        must, want = goal.bounds(run)
        lines.append(
            (
                goal.title,
                "" if value is None else f"{value:.3g}{goal.unit}",
                f"{sign} {must:g}{goal.unit}",
                f"{sign} {want:g}{goal.unit}",
                goal.verdict(run, value),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = (
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join(["", *rows, "", *(_asides(run) if is_measured else []), *_verdicts(run), *_lacks(run)])


def _asides(run: Run) -> list[str]:
    """What nothing has to reach, but decides how the engine is set."""
    figures = {
        "absmaxes in float32 over nested ones, rows 1 to 64": _of_plain_absmaxes(run),
        "graphs over launches, decode of 1 row": _of_graphs(run, 1),
        "graphs over launches, decode of 32 rows": _of_graphs(run, 32),
    }
    return [f"{title}: {value:.3g}x" for title, value in figures.items() if value is not None]


def _of_plain_absmaxes(run: Run) -> float | None:
    """How many times as fast, by the same configurations."""
    times = {
        (tuple(each["candidate"]), each["rows"], each["absmax"]): each["us"]
        for each in _part(run, "C").of("nf4")
        if each["rows"] in _FEW_ROWS
    }
    ratios = [
        us / times[candidate, rows, "plain"]
        for (candidate, rows, absmax), us in times.items()
        if absmax == "nested" and (candidate, rows, "plain") in times
    ]
    return geometric_mean(ratios) if ratios else None


def _of_graphs(run: Run, rows: int) -> float | None:
    return _over(_decode(run, rows), _decode(run, rows, on="strict, launched"))


def _verdicts(run: Run) -> list[str]:
    """Of what is right or wrong, and not fast or slow."""
    counts = {
        "kernels right": [each["is_right"] for each in _part(run, "A").of("kernel")],
        "configurations whose bits hold": [each["holds"] for each in _part(run, "B").of("bits")],
        "ways of attention whose bits hold": [
            each["holds"] for each in _part(run, "B").of("bits of attention")
        ],
        "sanitizer's tools without a finding": [each["is_clean"] for each in _part(run, "H").of("sanitizer")],
        "optimizers whose losses are finite and fall": [
            each["is_finite"] and each["falls"] for each in _part(run, "T").of("training")
        ],
    }
    return [
        f"{title}: {sum(each)} of {len(each)}" + ("" if all(each) else "  MISSED")
        if each
        else f"{title}: {NOT_MEASURED}"
        for title, each in counts.items()
    ]


_MOST_LACKS = 20


def _lacks(run: Run) -> list[str]:
    lines = [f"{name} left out: {each}" for name, found in run.items() for each in found.lacks]
    more = len(lines) - _MOST_LACKS
    return [*lines[:_MOST_LACKS], *([f"and {more} more, in the parts' files"] if more > 0 else [])]
