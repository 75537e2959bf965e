"""A profile as a table, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.profile.costs import CHOOSING, LINEARS, Cost
from benchmarks.profile.rates import Rates
from benchmarks.profile.session import PARTS, Profile
from benchmarks.workload import Case

_HEADER = ("", "ms", "of the step", "MB", "Gflop", "limit, ms", "reached")


def limit_s(profile: Profile, rates: Rates) -> float:
    """The least time of a step, if each part took the least it can."""
    return sum(cost.limit_s(rates.read_bytes, rates.flops) for cost in profile.costs.values())


def step_table(
    case: Case, context: int, profile: Profile, rates: Rates, top_p_s: float | None, port_s: float | None
) -> str:
    """A line for each part that takes any time, then the whole step, then what is not part of it.

    Args:
        case: what ran.
        context: tokens behind which it began.
        profile: of its steps.
        rates: of the machine.
        top_p_s: seconds that choosing takes with top_p 0.9; None if not measured.
        port_s: seconds a step that gRPC's event loop takes; None if not measured.
    """
    lines: list[tuple[str, ...]] = [_HEADER]
    for part in PARTS:
        if profile.parts[part] > 0 or (part in profile.costs and profile.costs[part] != Cost()):
            lines.append(
                _line(_label(part), profile.parts[part], profile.step_s, profile.costs.get(part), rates)
            )
    whole = sum(profile.costs.values(), Cost())
    limit = limit_s(profile, rates)
    lines.append(
        ("step", _ms(profile.step_s), "", *_amounts(whole), _ms(limit), _percent(limit / profile.step_s))
    )
    if top_p_s is not None:
        lines.append(
            ("choosing, top_p 0.9 instead", _ms(top_p_s), _percent(top_p_s / profile.step_s), *[""] * 4)
        )
    if port_s is not None:
        lines.append(
            ("gRPC's event loop, beside it", _ms(port_s), _percent(port_s / profile.step_s), *[""] * 4)
        )
    return f"{title(case, context)}\n{_aligned(lines)}"


def title(case: Case, context: int) -> str:
    """Of a table."""
    what = f"{case.num_adapters} LoRA" if case.num_adapters else "base"
    plural = "" if case.num_sequences == 1 else "s"
    return f"{case.num_sequences} sequence{plural} behind {context} tokens, {what}"


def _label(part: str) -> str:
    if part in LINEARS:
        return f"linear {part}"
    return "choosing, greedy" if part == CHOOSING else part


def _line(label: str, taken_s: float, step_s: float, cost: Cost | None, rates: Rates) -> tuple[str, ...]:
    share = _percent(taken_s / step_s)
    if cost is None:
        return label, _ms(taken_s), share, "", "", "", ""
    limit = cost.limit_s(rates.read_bytes, rates.flops)
    reached = (_ms(limit), _percent(limit / taken_s)) if limit and taken_s else ("", "")
    return label, _ms(taken_s), share, *_amounts(cost), *reached


def _amounts(cost: Cost) -> tuple[str, str]:
    """Megabytes, those in the caches in parentheses; and gigaflops."""
    parts = []
    if cost.num_bytes:
        parts.append(f"{cost.num_bytes / 1e6:.3g}")
    if cost.cached_bytes:
        parts.append(f"({cost.cached_bytes / 1e6:.3g})")
    return " ".join(parts), f"{cost.flops / 1e9:.3g}" if cost.flops else ""


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        )
        for line in lines
    )


def as_json(
    case: Case, context: int, profile: Profile, rates: Rates, top_p_s: float | None, port_s: float | None
) -> Mapping[str, Any]:
    """The same, in seconds, bytes and flops."""
    return {
        "case": case.name,
        "context": context,
        "num_sequences": case.num_sequences,
        "num_adapters": case.num_adapters,
        "num_steps": profile.num_steps,
        "processors_left": profile.num_left,
        "step_s": profile.step_s,
        "limit_s": limit_s(profile, rates),
        "choosing_top_p_s": top_p_s,
        "grpc_event_loop_s": port_s,
        "parts": {
            part: {
                "seconds": profile.parts[part],
                **_cost(profile.costs.get(part), rates),
            }
            for part in PARTS
        },
    }


def _cost(cost: Cost | None, rates: Rates) -> Mapping[str, float]:
    if cost is None:
        return {}
    limit = cost.limit_s(rates.read_bytes, rates.flops)
    return {
        "bytes": cost.num_bytes,
        "cached_bytes": cost.cached_bytes,
        "flops": cost.flops,
        "limit_s": limit,
    }
