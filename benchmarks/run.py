"""The whole benchmark: options, the order of things, and the results."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report
from benchmarks.adapters import make_adapters
from benchmarks.baselines import PEFT, TRANSFORMERS, Baseline, BaselineSession
from benchmarks.encoding import FORMS, EncoderSession, LibrariesSession
from benchmarks.engine import EngineSession, OwnEngine
from benchmarks.machine import busy_cores, machine_facts
from benchmarks.many_tasks import LookupSession, fill_store
from benchmarks.measure import Measurement, Sample, System
from benchmarks.process import measure_memory, measure_start, serving
from benchmarks.registrations import RegisteringSession, StreamsSession, measure_registrations
from benchmarks.row import BUSY
from benchmarks.rows import (
    LOOKUP_CASE,
    ROWS,
    START_CASES,
    SUBJECTS,
    encoding_name,
    held_name,
    registration_name,
)
from benchmarks.service import ClientSession, Service
from benchmarks.tier_rows import BESIDE_CASE, COLD_CASE, STARTS_CASE, zipf_name
from benchmarks.tiers import TiersSession, fill_with_copies
from benchmarks.worker import Worker
from benchmarks.workload import (
    BASE_CASES,
    HELD_COUNTS,
    LORA_CASES,
    MIXED_CASE,
    REGISTERED,
    SHARED,
    VIRTUAL_CASES,
    Adapter,
    Case,
    Settings,
    Workload,
    quick_settings,
)
from manyhats.engine.checkpoints.checkpoint import read_json
from manyhats.engine.checkpoints.fetch import locate_model
from manyhats.engine.home import default_home
from manyhats.engine.model.describe import describe
from manyhats.engine.model.families.reading import read_family

RESULTS = Path(__file__).parent / "results"
DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_ENCODER = "all-minilm-l6-v2"
_SYSTEMS = {
    "base": (TRANSFORMERS, "engine"),
    "lora": (PEFT, "engine"),
    "methods": ("engine",),
    "grpc": ("engine", "grpc"),
}
"""Subject → the systems it compares."""
_SESSIONS: Mapping[Callable[[Workload], object], frozenset[str]] = {
    BaselineSession: frozenset((TRANSFORMERS, PEFT)),
    EngineSession: frozenset(("engine",)),
}
"""What runs in a worker process → the systems that need it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON; returns 1 with ``--strict`` unless every floor is reached."""
    options = _parse(arguments)
    # Before any library starts its threads; the worker processes inherit it.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    settings = quick_settings(options.threads) if options.quick else Settings(threads=options.threads)
    if options.rounds:
        settings = replace(settings, rounds=options.rounds)
    started = datetime.now(UTC)
    machine = {**machine_facts(), "time_utc": started.isoformat(timespec="seconds")}
    with TemporaryDirectory(prefix="manyhats-bench-") as directory:
        samples: list[Sample] = []
        if set(options.only) != {"encoders"}:
            workload = make_workload(options.model, settings, Path(directory), _adapters(options.only))
            samples += measure(workload, options.only)
        if "encoders" in options.only:
            samples += measure_encoders(options.encoder, settings, Path(directory))
    results = report.evaluate([row for row in ROWS if row.subject in options.only], samples)
    print(report.table(results))
    busy = report.disturbance(samples)
    if busy > report.MAX_BUSY_CORES:
        print(
            f"\nOther work kept up to {busy:.1f} cores busy: no time above is to be trusted, ratios least of"
            " all. Run it again on a quiet machine."
        )
    path = options.json or RESULTS / f"{started:%Y%m%dT%H%M%SZ}.json"
    facts = {"model": options.model, "encoder": options.encoder, "quick": options.quick, **asdict(settings)}
    report.write(path, report.document(settings=facts, machine=machine, samples=samples, results=results))
    print(f"\n{machine['cpu']}, {settings.threads} threads; every sample is in {path}")
    return 1 if options.strict and any(result.verdict not in ("", "ok") for result in results) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--model", default=DEFAULT_MODEL, help="alias, directory or hub id (%(default)s)")
    parser.add_argument("--encoder", default=DEFAULT_ENCODER, help="the same of an encoder (%(default)s)")
    parser.add_argument("--threads", type=int, default=cores, help="of every system (%(default)s)")
    parser.add_argument("--rounds", type=int, default=0, help="runs of every case (3; with --quick 1)")
    parser.add_argument(
        "--only", type=_subjects, default=SUBJECTS, metavar="NAME,…", help=", ".join(SUBJECTS)
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help=f"(in {RESULTS.name}/, by the time)")
    parser.add_argument("--quick", action="store_true", help="see that everything works; figures mean little")
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless every floor is reached")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    return options


def _subjects(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = sorted(set(names) - set(SUBJECTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    return names


def make_workload(model: str, settings: Settings, directory: Path, adapters: Collection[Adapter]) -> Workload:
    """Finds the model, and writes adapters for it."""
    located = locate_model(model, default_home())
    family = read_family(read_json(located.directory / "config.json"))
    base = describe(family, names=located.names, digest="")
    return Workload(
        settings=settings,
        model=model,
        directory=located.directory,
        vocab_size=family.architecture.vocab_size,
        linear_parameters=family.architecture.num_linear_parameters(),
        scratch=directory,
        adapters=make_adapters(directory / "adapters", base, adapters, settings),
    )


def _adapters(subjects: Sequence[str]) -> set[Adapter]:
    cases = {*_cases(subjects), *([LORA_CASES[-1]] if "memory" in subjects else [])}
    stored = (*REGISTERED, SHARED) if "store" in subjects else (SHARED,) if "tiers" in subjects else ()
    return {*stored, *(adapter for case in cases for adapter in case.adapters)}


def measure(workload: Workload, subjects: Sequence[str]) -> Iterator[Sample]:
    """Every sample of the subjects: starts first, the store, then all systems in turn, then memory."""
    settings = workload.settings
    if "start" in subjects:
        yield from _starts(workload)
    if "store" in subjects:
        yield from _store(workload)
    if "tiers" in subjects:
        yield from _tiers(workload)
    names = {name for subject in subjects for name in _SYSTEMS.get(subject, ())}
    with ExitStack() as stack:
        # All of them load at once; nothing is measured before they are done.
        workers = {
            session: stack.enter_context(Worker(session, workload))
            for session, users in _SESSIONS.items()
            if users & names
        }
        server = stack.enter_context(serving(workload)) if {"grpc", "memory"} & set(subjects) else None
        for worker in workers.values():
            worker.wait_ready()
        baselines = [
            Baseline(name, workers[BaselineSession]) for name in (TRANSFORMERS, PEFT) if name in names
        ]
        systems: list[System] = [*baselines]
        if EngineSession in workers:
            engine = OwnEngine(workers[EngineSession])
            systems.append(engine)
        if server is not None:
            service = Service(stack.enter_context(Worker(ClientSession, workload, server.grpc)))
            systems += [service] if "grpc" in names else []
        yield from _rounds(settings, systems, _cases(subjects))
        for baseline in baselines:
            yield from baseline.probes
        if "methods" in subjects:
            for count in HELD_COUNTS:
                run = partial(engine.count_held_blocks, count)
                yield _sample(engine.name, "", held_name(count), 0, run)
        if server is not None and "memory" in subjects:
            service.measure(LORA_CASES[-1], "", settings.rounds)  # every adapter is loaded
            yield _sample("server", "", "memory", 0, partial(measure_memory, server, workload))


def measure_encoders(model: str, settings: Settings, scratch: Path) -> Iterator[Sample]:
    """Every sample of an encoder, all systems in turn."""
    directory, adapters = locate_model(model, default_home()).directory, scratch / "encoder-adapters"
    with (
        Worker(LibrariesSession, directory, adapters) as libraries,
        Worker(EncoderSession, model, adapters) as engine,
    ):
        libraries.wait_ready()
        for index in range(settings.rounds):
            yield from _quiet_check(settings, index)
            for form in FORMS:
                case = encoding_name(form)
                if form != "nf4":
                    yield _sample("transformers", "", case, index, partial(libraries.call, "base", form))
                    yield _sample("peft", "", case, index, partial(libraries.call, "tasks", form))
                yield _sample("engine", "", case, index, partial(engine.call, "measure", form))


def _cases(subjects: Sequence[str]) -> list[Case]:
    cases = set(BASE_CASES) if {"base", "grpc"} & set(subjects) else set()
    if "lora" in subjects:
        cases |= {Case(32), *LORA_CASES}
    if "methods" in subjects:
        cases |= {Case(1), Case(32), MIXED_CASE, *VIRTUAL_CASES}
    if "grpc" in subjects:
        cases.add(LORA_CASES[-1])
    return sorted(cases, key=lambda case: (case.num_adapters, case.num_sequences, case.methods))


def _starts(workload: Workload) -> Iterator[Sample]:
    _sample("server", "", "first start", -1, partial(measure_start, workload))  # fills the caches
    for index in range(workload.settings.starts):
        yield _sample("server", "", "start", index, partial(measure_start, workload))


def _store(workload: Workload) -> Iterator[Sample]:
    """Starts with and without very many tasks, in turn; then look-ups and registrations beside those tasks."""
    settings, many = workload.settings, workload.scratch / "many-tasks"
    with serving(workload, many) as server, Worker(LookupSession, workload, server.grpc) as lookups:
        lookups.call("register", workload.adapters[SHARED])  # and the start has filled the caches
    fill_store(many, settings.num_tasks)
    for index in range(settings.rounds):
        for case, store in zip(START_CASES, (many, None), strict=True):
            yield _sample("server", "", case, index, partial(measure_start, workload, store))
    with ExitStack() as stack:
        target = stack.enter_context(serving(workload, many)).grpc
        lookups, streams, registering = (
            stack.enter_context(Worker(session, workload, target))
            for session in (LookupSession, StreamsSession, RegisteringSession)
        )
        yield _sample("server", "", LOOKUP_CASE, 0, partial(lookups.call, "measure"))
        for each in BASE_CASES:
            run = partial(measure_registrations, streams, registering, each, settings)
            yield _sample("server", "", registration_name(each), 0, run)


def _tiers(workload: Workload) -> Iterator[Sample]:
    """Many tasks on a server in whose memory few of them fit; a new one each round, since all are cold at its start."""
    settings, many = workload.settings, workload.scratch / "many-loras"
    adapter = workload.adapters[SHARED]
    with serving(workload, many) as server, Worker(TiersSession, workload, server.grpc) as session:
        session.call("register", adapter)
    fill_with_copies(many, settings.num_loras)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    limits = {"adapter_memory_bytes": settings.in_memory * size, "max_adapters": settings.in_slots}
    for index in range(settings.rounds):
        yield from _quiet_check(settings, index)
        with ExitStack() as stack:
            server = stack.enter_context(serving(workload, many, **limits))
            session = stack.enter_context(Worker(TiersSession, workload, server.grpc))
            yield _sample("server", "", COLD_CASE, index, partial(session.call, "all_at_once"))
            yield _sample("server", "", STARTS_CASE, index, partial(session.call, "one_by_one"))
            for rank, num_tasks in ((1, 1), (500, settings.num_loras)):
                run = partial(session.call, "by_popularity", num_tasks)
                yield _sample("server", "", zipf_name(rank), index, run)
            yield _sample("server", "", BESIDE_CASE, index, partial(session.call, "beside_streams"))


def _rounds(settings: Settings, systems: Sequence[System], cases: Sequence[Case]) -> Iterator[Sample]:
    """Each case by one system after the other, so that they share what else the machine does."""
    for index in range(settings.rounds):
        yield from _quiet_check(settings, index)
        for case in cases:
            for system in systems:
                for variant in system.variants(case):
                    run = partial(system.measure, case, variant, index)
                    yield _sample(system.name, variant, case.name, index, run)
    yield from _quiet_check(settings, settings.rounds)


def _quiet_check(settings: Settings, index: int) -> Iterator[Sample]:
    """What else the machine does, now that no measured system does anything."""
    cores = busy_cores(settings.quiet_check_s)
    if cores is not None:
        yield Sample(
            system=BUSY.system,
            variant="",
            case=BUSY.case,
            round=index,
            measurement=Measurement({BUSY.figure: cores}),
        )


def _sample(system: str, variant: str, case: str, index: int, run: Callable[[], Measurement]) -> Sample:
    """Runs something and says so on stderr."""
    began_s = time.perf_counter()
    measurement = run()
    seconds = time.perf_counter() - began_s
    print(f"round {index + 1}: {case} {system} {variant} {seconds:.1f} s", file=sys.stderr, flush=True)
    return Sample(system=system, variant=variant, case=case, round=index, measurement=measurement)
