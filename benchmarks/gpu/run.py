"""The whole run: parts in their order, each in a process of its own that has a deadline, and then what they say."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.goals import table
from benchmarks.gpu.measured import write_configuration
from benchmarks.gpu.record import Recorder, read, write
from benchmarks.gpu.scale import CPU, GPU, Scale

_END_S = 20.0
"""That a part has, beyond its limit, to come to an end by itself."""
_PRELOAD = "benchmarks.gpu.preload"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the benchmark.

    Attributes:
        name: as ``--only`` has it.
        module: whose ``run`` it is.
        seconds: that it may take, of a budget of ``BUDGET_S``.
        title: what it answers.
    """

    name: str
    module: str
    seconds: float
    title: str


PARTS = (
    Part("0", "ceilings", 15, "versions, card, and what it could do at most"),
    Part("A", "correctness", 70, "are the kernels right, and do they compile"),
    Part("B", "row_bits", 50, "does a row keep its bits among any others"),
    Part("C", "linears", 85, "linears in NF4, beside bitsandbytes"),
    Part("D", "mixing", 40, "attention beside torch's, adapters beside products row by row"),
    Part("E", "steps", 90, "steps of the engine"),
    Part("F", "peers", 60, "transformers with bitsandbytes, and PEFT"),
    Part("G", "cold", 20, "an adapter loaded while others decode"),
    Part("H", "sanitizer", 15, "memory and races, by compute-sanitizer"),
    Part("T", "training", 25, "steps of QLoRA"),
)
BUDGET_S = sum(part.seconds for part in PARTS)
_SHORTENED, _CUT = "E", "F"
"""Short of time, the one is shortened before the other is cut."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it all; 0 unless a part failed."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    scale = CPU if options.cpu else GPU
    if options.cpu:
        os.environ["TRITON_INTERPRET"] = "1"
    parts = [part for part in PARTS if part.name in options.only]
    _run_parts(parts, scale, options.out, options.budget)
    found = {part.name: read(options.out, part.name) for part in parts}
    write_configuration(options.out, found)
    print(table(found, is_measured=scale.is_gpu))
    failed = [name for name, each in found.items() if each.failure]
    for name in failed:
        print(f"part {name} failed: {found[name].failure.strip().splitlines()[-1]}")
    print(f"everything is in {options.out}")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    lines = "\n".join(f"  {part.name}  {part.title} ({part.seconds:.0f} s)" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=f"{__doc__}\n\nparts:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the figures go")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="(%(default).0f)")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=names, metavar="PART,…", help=",".join(names)
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="see that everything works, in Triton's interpreter; no figure counts",
    )
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.only) - set(names)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(names)}")
    if options.budget <= 0:
        parser.error("--budget must be above 0")
    return options


def _run_parts(parts: Sequence[Part], scale: Scale, directory: Path, budget_s: float) -> None:
    began_s = time.perf_counter()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])  # once for all parts; none sees another one's failures
    for index, part in enumerate(parts):
        (directory / f"{part.name}.json").unlink(missing_ok=True)
        left_s = budget_s - (time.perf_counter() - began_s)
        limit_s, is_short = limit_of(part, parts[index + 1 :], left_s, budget_s)
        if limit_s <= 0:
            Recorder(directory, part.name, 0).lacks("all of it: the budget is spent")
            continue
        print(f"{part.name}  {part.title}; up to {limit_s:.0f} s", flush=True)
        process = context.Process(
            target=_run_part, args=(part, scale, directory, limit_s, is_short), daemon=False
        )
        process.start()
        process.join(limit_s + _END_S)
        _end(process, directory, part, limit_s)


def limit_of(part: Part, after: Sequence[Part], left_s: float, budget_s: float) -> tuple[float, bool]:
    """Seconds that a part gets of what is left, and whether it is to be short.

    Those that follow keep theirs: what is missing is taken from part E first, then from F, then from what comes last.
    """
    scaled = min(1.0, budget_s / BUDGET_S)
    own_s, reserved_s = part.seconds * scaled, sum(each.seconds for each in after) * scaled
    spare_s = left_s - reserved_s
    if part.name == _SHORTENED:
        return max(min(left_s, own_s / 3), min(own_s, spare_s)), spare_s < own_s
    if part.name == _CUT:
        return max(0.0, min(own_s, spare_s)), False
    return max(0.0, min(own_s, left_s)), False


def _end(process: multiprocessing.process.BaseProcess, directory: Path, part: Part, limit_s: float) -> None:
    """See that the process is gone, and that its file says so if it did not end by itself."""
    failure = ""
    if process.is_alive():
        process.kill()
        process.join()
        failure = f"killed: it did not end {_END_S:.0f} s after its limit of {limit_s:.0f} s"
    elif process.exitcode:
        failure = f"its process ended with {process.exitcode}"
    found = read(directory, part.name)
    if failure and not found.failure:
        found.failure = failure
        write(directory, found)


def _run_part(part: Part, scale: Scale, directory: Path, limit_s: float, is_short: bool) -> None:
    """In the part's own process."""
    out = Recorder(directory, part.name, limit_s, is_short=is_short)
    try:
        importlib.import_module(f"benchmarks.gpu.{part.module}").run(out, scale)
    except Exception as error:  # noqa: BLE001 - whatever ends one part, the others go on
        if isinstance(error, ModuleNotFoundError) and not _is_ours(error):
            out.lacks(f"what needs {error.name}, which is not installed")
        else:
            out.found.failure = traceback.format_exc()
            print(out.found.failure, flush=True)
    finally:
        out.write()


def _is_ours(error: ModuleNotFoundError) -> bool:
    return (error.name or "").startswith(("benchmarks", "manyhats"))
