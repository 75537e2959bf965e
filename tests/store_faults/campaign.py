"""Every operation, every harm, every call: the table, and what was not survived. Runs with the shim preloaded."""

from __future__ import annotations

import argparse
import errno
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from store_faults.preload import Action, Shim
from store_faults.scenarios import SCENARIOS, Scenario
from store_faults.trial import Bench, Harm

_HARMS = (
    Harm("kill -9", Action.KILL),
    Harm("kill -9 amid a write", Action.KILL_TORN, letters="w"),
    Harm("disk full from there on", Action.FAIL_FROM, errno.ENOSPC, letters="owatml"),
    Harm("disk fails once", Action.FAIL_ONCE, errno.EIO, with_reads=True, goes_on=True),
)


@dataclass(slots=True)
class Result:
    """What a scenario came to under one harm."""

    num_tried: int = 0
    num_old: int = 0
    num_new: int = 0
    failures: list[str] = field(default_factory=list)


def try_scenario(scenario: Scenario, harm: Harm, bench: Bench, every: int) -> Result:
    """Do harm at every call, or at one in ``every``."""
    result = Result()
    for call, letter in enumerate(bench.calls(harm), 1):
        if call % every or (harm.letters and letter not in harm.letters):
            continue
        result.num_tried += 1
        try:
            if bench.try_harm(harm, call):
                result.num_new += 1
            else:
                result.num_old += 1
        except AssertionError as error:
            result.failures.append(f"{scenario.name}, {harm.name} at call {call} ({letter}): {error}")
    return result


def main() -> int:
    """Try everything and print a table; 0 if all was survived."""
    parser = argparse.ArgumentParser(prog="store_faults")
    parser.add_argument("--every", type=int, default=1, help="do harm at one call in so many (1)")
    parser.add_argument(
        "--only", action="append", help="an operation, as the table names it; may be repeated"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="store-faults-") as directory:
        chosen = [
            scenario for scenario in SCENARIOS if arguments.only is None or scenario.name in arguments.only
        ]
        return _try_all(chosen, Path(directory).resolve(), arguments.every)


def _try_all(scenarios: list[Scenario], directory: Path, every: int) -> int:
    torch.set_num_threads(1)
    shim = Shim()
    failures: list[str] = []
    num_tried = 0
    print(f"{'operation':32}{'harm':26}{'tried':>7}{'old':>6}{'new':>6}{'survived':>10}", flush=True)
    for number, scenario in enumerate(scenarios):
        bench = Bench(scenario, directory / str(number), shim)
        for harm in _HARMS:
            result = try_scenario(scenario, harm, bench, every)
            num_tried += result.num_tried
            failures += result.failures
            survived = result.num_old + result.num_new
            print(
                f"{scenario.name:32}{harm.name:26}{result.num_tried:7}{result.num_old:6}{result.num_new:6}{survived:10}",
                flush=True,
            )
    print(f"{num_tried} failpoints tried, {num_tried - len(failures)} survived")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures or not num_tried else 0


if __name__ == "__main__":
    sys.exit(main())
