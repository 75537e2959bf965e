"""``make profile``: where a step's time goes on the CPU, part by part, beside what the machine could do."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import report
from benchmarks.machine import busy_cores, machine_facts
from benchmarks.profile.costs import CHOOSING
from benchmarks.profile.port import port_times
from benchmarks.profile.rates import Rates, RatesSession
from benchmarks.profile.session import Profile, ProfileSession
from benchmarks.profile.tables import as_json, step_table, title
from benchmarks.run import DEFAULT_MODEL, RESULTS, make_workload
from benchmarks.worker import Worker
from benchmarks.workload import Case, Settings, Workload
from manyhats.engine.checkpoints.checkpoint import read_json
from manyhats.engine.config import EngineConfig
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.families.reading import read_family

_ADAPTERS = 32
"""Distinct ones, at most."""
_SPARE = 32
"""Tokens that a sequence may decode."""
_MEMORY_SHARE = 0.6
"""Of the free memory, for cells."""
_BLOCK = 16
_BUFFER_BYTES = 2**29
_FEW_STEPS = 4
"""For what is only chosen otherwise."""


@dataclass(frozen=True, slots=True)
class Place:
    """A number of sequences behind a context."""

    num_sequences: int
    context: int

    def cell_bytes(self, architecture: Architecture) -> int:
        """Of all its sequences, in whole blocks."""
        blocks = -(-(self.context + _SPARE) // _BLOCK)
        return self.num_sequences * blocks * _BLOCK * architecture.kv_bytes_per_token("bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table for each place, writes the JSON."""
    options = _parse(arguments)
    # Before any library starts its threads; the worker processes inherit it.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    settings = Settings(
        threads=options.threads, decode_steps=options.steps, prompt_tokens=min(options.contexts)
    )
    started = datetime.now(UTC)
    machine = {**machine_facts(), "time_utc": started.isoformat(timespec="seconds")}
    with TemporaryDirectory(prefix="manyhats-profile-") as directory:
        adapters = {adapter for case in _cases(options.sequences) for adapter in case.adapters}
        workload = make_workload(options.model, settings, Path(directory), adapters)
        busy = _busy(options)
        rates = _rates(options)
        print(_rates_line(rates, options.threads), flush=True)
        profiles = list(_profiles(options, workload, rates))
        rates_after = _rates(options)
    document = {
        "format": 1,
        "settings": {"model": options.model, "quick": options.quick, **asdict(settings)},
        "machine": machine,
        "busy_cores": busy,
        "rates": asdict(rates),
        "rates_after": asdict(rates_after),
        "profiles": profiles,
    }
    path = options.json or RESULTS / f"profile-{started:%Y%m%dT%H%M%SZ}.json"
    report.write(path, json.dumps(document, indent=1) + "\n")
    print(f"\nat the end: {_rates_line(rates_after, options.threads)}")
    print(f"{machine['cpu']}; everything is in {path}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--model", default=DEFAULT_MODEL, help="alias, directory or hub id (%(default)s)")
    parser.add_argument("--threads", type=_positive, default=cores, help="of every loop (%(default)s)")
    parser.add_argument("--sequences", type=_numbers, metavar="N,…", help="at once (1,8,32,128; --quick 1,4)")
    parser.add_argument("--contexts", type=_numbers, metavar="N,…", help="(128,1024,4096; --quick 32)")
    parser.add_argument(
        "--steps", type=_steps, default=0, help=f"measured, at most {_SPARE - 4} (16; --quick 4)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help=f"(in {RESULTS.name}/, by the time)")
    parser.add_argument("--quick", action="store_true", help="see that everything works; figures mean little")
    options = parser.parse_args(arguments)
    options.sequences = options.sequences or ((1, 4) if options.quick else (1, 8, 32, 128))
    options.contexts = options.contexts or ((32,) if options.quick else (128, 1024, 4096))
    options.steps = options.steps or (4 if options.quick else 16)
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _steps(text: str) -> int:
    if _positive(text) > _SPARE - 4:
        raise argparse.ArgumentTypeError(f"at most {_SPARE - 4} steps, not {text}")
    return int(text)


def _cases(sequences: Sequence[int]) -> list[Case]:
    """The base, and as many distinct LoRAs as there are sequences, up to 32."""
    return [Case(count, adapters) for count in sequences for adapters in (0, min(count, _ADAPTERS))]


def _busy(options: argparse.Namespace) -> float | None:
    """Cores that are busy while nothing is measured; says so if they are too many."""
    busy = busy_cores(0.3 if options.quick else 2.0)
    if busy is not None and busy > report.MAX_BUSY_CORES:
        print(f"\nOther work keeps {busy:.1f} cores busy: what follows is not to be trusted.", flush=True)
    return busy


def _rates(options: argparse.Namespace) -> Rates:
    buffer_bytes, seconds = (_BUFFER_BYTES // 16, 0.1) if options.quick else (_BUFFER_BYTES, 1.0)
    with Worker(RatesSession, options.threads, buffer_bytes, seconds) as worker:
        rates: Rates = worker.call("measure")
    return rates


def _rates_line(rates: Rates, threads: int) -> str:
    line = f"threads: {threads}; reading: {rates.read_bytes / 1e9:.1f} GB/s"
    line += f"; float32: {rates.float32_flops / 1e9:.0f} Gflop/s"
    if rates.int16_flops is not None:
        line += f"; 16-bit integers: {rates.int16_flops / 1e9:.0f} Gop/s"
    return line


def _profiles(options: argparse.Namespace, workload: Workload, rates: Rates) -> Iterator[Mapping[str, Any]]:
    """Every case at every place that fits, as JSON; prints its tables."""
    architecture = read_family(read_json(workload.directory / "config.json")).architecture
    places = list(_fitting(options, architecture))
    if not places:
        return
    cases = _cases(sorted({place.num_sequences for place in places}))
    port = port_times(workload, cases)
    config = EngineConfig(
        num_threads=options.threads,
        max_num_sequences=2
        * max(place.num_sequences for place in places),  # a task is not given the last seats
        max_num_batched_tokens=max(place.num_sequences * place.context for place in places),
        kv_cache_bytes=max(place.cell_bytes(architecture) for place in places),
    )
    with Worker(ProfileSession, workload, config) as worker:
        worker.wait_ready()
        for place in places:
            busy = _busy(options)
            top_p: Profile = worker.call("measure", Case(place.num_sequences), place.context, _FEW_STEPS, 0.9)
            for case in _cases([place.num_sequences]):
                profile: Profile = worker.call("measure", case, place.context, options.steps)
                shown = case, place.context, profile, rates, top_p.parts[CHOOSING], port.get(case.name)
                print(f"\n{step_table(*shown)}", flush=True)
                if profile.num_left:
                    print(f"The engine left {profile.num_left} processors to other work.", flush=True)
                yield {**as_json(*shown), "busy_cores": busy}


def _fitting(options: argparse.Namespace, architecture: Architecture) -> Iterator[Place]:
    """The places whose cells fit into memory and context; says which do not."""
    free = _MEMORY_SHARE * available_bytes()
    for context in options.contexts:
        for count in options.sequences:
            place = Place(count, context)
            if context + _SPARE > architecture.max_context_length:
                why = f"the model's context is {architecture.max_context_length} tokens"
            elif place.cell_bytes(architecture) > free:
                why = f"its cells take {place.cell_bytes(architecture) / 1e9:.1f} GB of {free / 1e9:.1f}"
            else:
                yield place
                continue
            print(f"Left out: {title(Case(count), context)}; {why}.", flush=True)


def available_bytes() -> int:
    """Memory that a new process can take; all of the machine's where the system does not say."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
