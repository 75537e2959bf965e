"""``python -m benchmarks.training``: LoRA training beside PEFT and transformers' Trainer, on the same NF4 base."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import report
from benchmarks.machine import busy_cores, machine_facts
from benchmarks.measure import Measurement, Sample
from benchmarks.row import BUSY, Pick, Row, at_least
from benchmarks.training.cases import CASES, FLOOR, TrainingCase, TrainingWorkload
from benchmarks.training.systems import OwnTrainer, PeftTrainer
from benchmarks.worker import Worker
from manyhats.engine.checkpoints.checkpoint import read_json
from manyhats.engine.checkpoints.fetch import locate_model
from manyhats.engine.home import default_home
from manyhats.engine.model.families.reading import read_family

RESULTS = Path(__file__).parent.parent / "results"
DEFAULT_MODEL = "smollm2-135m-instruct"
SYSTEMS: dict[str, Callable[[TrainingWorkload], object]] = {"trainer": OwnTrainer, "peft": PeftTrainer}
_HOPELESS = 1.5
"""A variant that is slower than another by this factor in a short run is not measured."""


def rows(cases: Sequence[TrainingCase]) -> list[Row]:
    """Whole steps of each case against the other system's best variant."""
    return [
        Row(
            subject="training",
            title=case.title,
            unit="tokens/s",
            ours=Pick("trainer", case.name, "tokens_per_s"),
            against=Pick("peft", case.name, "tokens_per_s"),
            judge="ratio",
            floor=at_least(FLOOR),
        )
        for case in cases
    ]


def measure(workload: TrainingWorkload, cases: Sequence[TrainingCase]) -> Iterator[Sample]:
    """Every sample: in each round both systems run each case, one after the other."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(make, workload)) for name, make in SYSTEMS.items()}
        for worker in workers.values():
            worker.wait_ready()
        variants = {
            (name, case): _hopeful(name, worker, workload, case)
            for name, worker in workers.items()
            for case in cases
        }
        for index in range(workload.rounds):
            yield _busy(workload, index)
            for case in cases:
                for name, worker in workers.items():
                    for variant in variants[name, case]:
                        result = worker.call("measure", case, variant, index, workload.steps)
                        _tell(f"round {index + 1}", case, name, variant, result)
                        yield _sample(name, variant, case.name, index, result)
        yield _busy(workload, workload.rounds)


def _hopeful(name: str, worker: Worker, workload: TrainingWorkload, case: TrainingCase) -> list[str]:
    """The variants that a short run does not show to be hopeless."""
    speeds = {}
    for variant in worker.call("variants"):
        result = worker.call("measure", case, variant, -1, workload.probe_steps)
        speeds[variant] = result.figures["tokens_per_s"]
        _tell("probe", case, name, variant, result)
    return [variant for variant, speed in speeds.items() if speed * _HOPELESS >= max(speeds.values())]


def _busy(workload: TrainingWorkload, index: int) -> Sample:
    cores = busy_cores(workload.quiet_check_s)
    figures = {} if cores is None else {BUSY.figure: cores}
    return _sample(BUSY.system, "", BUSY.case, index, Measurement(figures))


def _sample(system: str, variant: str, case: str, index: int, measurement: Measurement) -> Sample:
    return Sample(system=system, variant=variant, case=case, round=index, measurement=measurement)


def _tell(what: str, case: TrainingCase, system: str, variant: str, result: Measurement) -> None:
    speed = result.figures["tokens_per_s"]
    print(f"{what}: {case.name} {system} {variant} {speed:.0f} tokens/s", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON; returns 1 with ``--strict`` unless every floor is reached."""
    options = _parse(arguments)
    # Before any library starts its threads; the worker processes inherit it.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    workload = make_workload(options)
    cases = [case for case in CASES if case.name in options.only]
    started = datetime.now(UTC)
    machine = {**machine_facts(), "time_utc": started.isoformat(timespec="seconds")}
    samples = list(measure(workload, cases))
    results = report.evaluate(rows(cases), samples)
    print(report.table(results))
    busy = report.disturbance(samples)
    if busy > report.MAX_BUSY_CORES:
        print(f"\nOther work kept up to {busy:.1f} cores busy: run it again on a quiet machine.")
    path = options.json or RESULTS / f"training-{started:%Y%m%dT%H%M%SZ}.json"
    facts = {**asdict(workload), "directory": workload.directory.name, "quick": options.quick}
    report.write(path, report.document(settings=facts, machine=machine, samples=samples, results=results))
    print(f"\n{machine['cpu']}, {workload.threads} threads; every sample is in {path}")
    return 1 if options.strict and any(result.verdict not in ("", "ok") for result in results) else 0


def make_workload(options: argparse.Namespace) -> TrainingWorkload:
    """Finds the model."""
    located = locate_model(options.model, default_home())
    architecture = read_family(read_json(located.directory / "config.json")).architecture
    workload = TrainingWorkload(
        model=options.model,
        directory=located.directory,
        vocab_size=architecture.vocab_size,
        threads=options.threads,
    )
    if options.quick:
        workload = replace(workload, rounds=1, steps=1, batch_size=2, longest=16, quiet_check_s=0.3)
    return replace(workload, rounds=options.rounds or workload.rounds)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names = tuple(case.name for case in CASES)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="alias, directory or hub id (%(default)s)")
    parser.add_argument("--threads", type=int, default=cores, help="of both systems (%(default)s)")
    parser.add_argument("--rounds", type=int, default=0, help="runs of every case (3; with --quick 1)")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=names, metavar="NAME,…", help=", ".join(names)
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help=f"(in {RESULTS.name}/, by the time)")
    parser.add_argument("--quick", action="store_true", help="see that everything works; figures mean little")
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless every floor is reached")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.only) - set(names))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(names)}")
    return options


# Worker processes import this module again.
if __name__ == "__main__":
    raise SystemExit(main())
