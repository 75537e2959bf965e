"""``python -m benchmarks.simulation``: the scheduler under a million requests for 10,000 tasks, in minutes on one core.

The scheduling and residency code that serves runs on a simulated clock; steps and loads take the time that formulas say
(``machine.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.simulation.cluster import spread
from benchmarks.simulation.routing import at_random, by_adapters, by_hash
from benchmarks.simulation.scenarios import (
    BANDS,
    Found,
    overload,
    popular,
    processor_s,
    quiet_first_ms,
)

_HALF_OF_THE_MACHINE = 12.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what each scenario shows.

    Raises:
        UnfairError, LeftOverError: the scheduler broke a promise.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the largest load (%(default)s)")
    parser.add_argument("--tasks", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument(
        "--replicas", type=int, help="spread the requests over so many, in three ways, and show nothing else"
    )
    options = parser.parse_args(arguments)
    if options.replicas:
        _spread(options.requests, options.tasks, options.replicas)
        return 0
    _popular(options.requests, options.tasks)
    _budgets(max(1000, options.requests // 20), options.tasks)
    _overload(max(1000, options.requests // 4), options.tasks)
    _greedy(max(60.0, options.requests / 500))
    return 0


def _popular(num_requests: int, num_tasks: int) -> None:
    found, seconds = processor_s(lambda: popular(num_requests, num_tasks))
    print(f"{num_tasks:,} tasks by Zipf's law, {_said(found)}, {seconds:.0f} s of processor time")
    first = 1
    for last, (count, percentiles) in zip(BANDS, found.answers.first_ms(), strict=True):
        shown = "  ".join(f"{each:7.0f}" for each in percentiles)
        print(f"  tasks {first:>5} to {last:>5}: {count:>9,} first tokens, p50 p95 p99 in ms {shown}")
        first = last + 1


def _budgets(num_requests: int, num_tasks: int) -> None:
    print(f"loads and evictions of {num_requests:,} such requests")
    for budget, num_slots in ((100, 32), (200, 32), (200, 200), (1000, 256)):
        found = popular(num_requests, num_tasks, num_slots=num_slots, budget=budget)
        print(
            f"  memory for {budget:>4}, slots for {num_slots:>3}: {found.num_loads:>7,} loads, "
            f"{found.num_evictions:>7,} evictions from memory, {found.num_slot_evictions:>7,} from slots"
        )


def _overload(num_requests: int, num_tasks: int) -> None:
    found = overload(num_requests, num_tasks)
    shares = found.shares
    assert shares is not None
    print(f"six times what one replica can answer, {_said(found)}")
    print(
        f"  a task waited through a window of 500 steps {shares.num_waited:,} times, and was served meanwhile "
        f"{shares.num_served:,} times; two differed by at most {shares.widest:.2f} of the bound"
    )


def _greedy(duration_s: float) -> None:
    normal = quiet_first_ms(_HALF_OF_THE_MACHINE, duration_s)
    greedy = quiet_first_ms(50 * _HALF_OF_THE_MACHINE, duration_s / 4)
    print(
        f"a quiet task's p95 to the first token: {normal:.0f} ms beside one that uses its half of the machine, "
        f"{greedy:.0f} ms beside one that asks for 50 times that: {greedy / normal:.2f} times"
    )


def _spread(num_requests: int, num_tasks: int, num_replicas: int) -> None:
    print(
        f"{num_requests:,} requests for {num_tasks:,} tasks on {num_replicas} replicas, of which half warm them up"
    )
    for how, make_route in (
        ("at random", at_random),
        ("by hash", by_hash),
        ("by adapters held", by_adapters),
    ):
        found = spread(make_route, num_requests=num_requests, num_tasks=num_tasks, num_replicas=num_replicas)
        first_ms = "  ".join(f"{each:5.0f}" for each in found.first_ms)
        print(
            f"  {how:<16} {found.loads_per_s:6.1f} loads a second, {100 * found.hit_ratio:.1f} % without one, first "
            f"tokens p50 p95 p99 in ms {first_ms}; the busiest got {found.busiest:.2f} of the average"
        )


def _said(found: Found) -> str:
    ends = ", ".join(f"{count:,} {name}" for name, count in found.answers.outcomes.most_common())
    return (
        f"{ends} in {found.simulated_s:,.0f} simulated s, {found.answers.num_tokens / found.simulated_s:,.0f} "
        f"tokens a second, at most {found.most_waiting:,} waiting; the scheduler took {found.scheduling_us:.0f} µs a "
        f"request and {found.step_us:.0f} µs a step"
    )


if __name__ == "__main__":
    raise SystemExit(main())
