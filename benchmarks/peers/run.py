"""manyhats beside its peers, in one interleaved run: options, the order of things, and the results."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report
from benchmarks.environments import UnavailableError
from benchmarks.machine import busy_cores, machine_facts
from benchmarks.measure import Measurement, Sample
from benchmarks.peers.llama_cpp import LlamaCppPeer
from benchmarks.peers.own import OwnPeer
from benchmarks.peers.peer import (
    ANSWER_CASES,
    DISTINCT,
    PARTS,
    QUICK_LENGTHS,
    Bench,
    Lengths,
    Peer,
    PeerFailedError,
)
from benchmarks.peers.report import full_table, rows_of
from benchmarks.peers.rows import make_rows
from benchmarks.peers.transformers import TransformersPeer
from benchmarks.peers.vllm import VllmPeer
from benchmarks.row import BUSY
from benchmarks.run import DEFAULT_MODEL, RESULTS, make_workload
from benchmarks.worker import WorkerError
from benchmarks.workload import Settings, quick_settings

PEERS: Mapping[str, Callable[[Bench], Peer]] = {
    LlamaCppPeer.name: LlamaCppPeer,
    VllmPeer.name: VllmPeer,
    TransformersPeer.name: TransformersPeer,
}
"""What ``--peers`` can name; manyhats always takes part."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON; returns 1 with ``--strict`` unless every goal is reached."""
    options = _parse(arguments)
    # Before any library starts its threads; all processes inherit it.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    settings = quick_settings(options.threads) if options.quick else Settings(threads=options.threads)
    if options.rounds:
        settings = replace(settings, rounds=options.rounds)
    lengths = QUICK_LENGTHS if options.quick else Lengths()
    started = datetime.now(UTC)
    machine = {**machine_facts(), "time_utc": started.isoformat(timespec="seconds")}
    skipped: dict[str, str] = {}
    with TemporaryDirectory(prefix="manyhats-peers-") as directory:
        adapters = {adapter for case in (*ANSWER_CASES, DISTINCT) for adapter in case.adapters}
        workload = make_workload(options.model, settings, Path(directory), adapters)
        peers = prepare(Bench(workload, lengths, options.only), options.peers, skipped)
        samples = _until_interrupted(measure(peers, settings, skipped))
    rows = rows_of(make_rows(lengths), options.peers)
    results = report.evaluate(rows, samples)
    print(full_table(rows, results, samples, skipped))
    facts = {"model": options.model, "quick": options.quick, "skipped": skipped}
    facts |= {**asdict(settings), **asdict(lengths)}
    path = options.json or RESULTS / f"peers-{started:%Y%m%dT%H%M%SZ}.json"
    report.write(path, report.document(settings=facts, machine=machine, samples=samples, results=results))
    print(f"\n{machine['cpu']}, {settings.threads} threads; every sample is in {path}")
    is_reached = len(results) == len(rows) and all(result.verdict in ("", "ok") for result in results)
    return 1 if options.strict and not is_reached else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--model", default=DEFAULT_MODEL, help="alias or directory (%(default)s)")
    parser.add_argument("--threads", type=int, default=cores, help="of every system (%(default)s)")
    parser.add_argument("--rounds", type=int, default=0, help="visits to every system (3; with --quick 1)")
    parser.add_argument(
        "--peers", type=_peers, default=tuple(PEERS), metavar="NAME,…", help=f"{', '.join(PEERS)} (all)"
    )
    parser.add_argument(
        "--only", choices=PARTS, help="what is measured: in process, or through servers (both)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help=f"(in {RESULTS.name}/, by the time)")
    parser.add_argument("--quick", action="store_true", help="see that everything works; figures mean little")
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless every goal is reached")
    options = parser.parse_args(arguments)
    options.only = PARTS if options.only is None else (options.only,)
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    if options.rounds < 0:
        parser.error("--rounds must be at least 1")
    return options


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = sorted(set(names) - PEERS.keys())
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return names


def prepare(bench: Bench, names: Sequence[str], skipped: dict[str, str]) -> list[Peer]:
    """manyhats and every chosen peer that can be had; ``skipped`` gets the others, with what they lack."""
    peers: list[Peer] = [OwnPeer(bench)]
    for name in names:
        print(f"preparing {name}; the first time its programs are installed", file=sys.stderr, flush=True)
        try:
            peers.append(PEERS[name](bench))
        except UnavailableError as error:
            skipped[name] = str(error)
    return peers


def measure(peers: Sequence[Peer], settings: Settings, skipped: dict[str, str]) -> Iterator[Sample]:
    """Visits every peer once a round. Between two visits nothing runs that belongs to this benchmark.

    A peer that fails is not visited again; ``skipped`` gets it, with what it said.
    """
    for index in range(settings.rounds):
        for peer in peers:
            if peer.name in skipped:
                continue
            yield from _quiet_check(settings, index, f"before {peer.name}")
            try:
                yield from _announced(peer.visit(index))
            except (PeerFailedError, WorkerError) as error:
                if isinstance(peer, OwnPeer):
                    raise
                skipped[peer.name] = f"failed in round {index + 1}: {error}"
    yield from _quiet_check(settings, settings.rounds - 1, "at the end")


def _until_interrupted(samples: Iterator[Sample]) -> list[Sample]:
    """All of them, or those that there were when the run was interrupted: hours should not be lost."""
    found: list[Sample] = []
    try:
        for sample in samples:
            found.append(sample)
    except KeyboardInterrupt:
        print("interrupted: the table has what was measured", file=sys.stderr, flush=True)
    return found


def _announced(samples: Iterator[Sample]) -> Iterator[Sample]:
    """Says of each on stderr what it was, and how long it took."""
    began_s = time.perf_counter()
    for sample in samples:
        seconds = time.perf_counter() - began_s
        what = f"{sample.case} {sample.system} {sample.variant}"
        print(f"round {sample.round + 1}: {what} {seconds:.1f} s", file=sys.stderr, flush=True)
        yield sample
        began_s = time.perf_counter()


def _quiet_check(settings: Settings, index: int, moment: str) -> Iterator[Sample]:
    """What else the machine does, now that nothing of this benchmark runs."""
    cores = busy_cores(settings.quiet_check_s)
    if cores is not None:
        yield Sample(
            system=BUSY.system,
            variant=moment,
            case=BUSY.case,
            round=index,
            measurement=Measurement({BUSY.figure: cores}),
        )
