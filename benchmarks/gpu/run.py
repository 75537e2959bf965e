"""The whole run: parts in their order, each in a process of its own that has a deadline, and then what they say."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.goals import table
from benchmarks.gpu.measured import write_configuration
from benchmarks.gpu.record import Recorder, path_of, read, write
from benchmarks.gpu.scale import CPU, GPU, Scale

_END_S = 20.0
"""That a part has, beyond its limit, to come to an end by itself."""
_PRELOAD = "benchmarks.gpu.preload"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the benchmark.

    Attributes:
        name: as ``--only`` has it.
        module: whose ``run`` it is, given a ``Recorder`` and a ``Scale``.
        seconds: that it may take, of a budget of ``BUDGET_S``.
        title: what it answers.
    """

    name: str
    module: str
    seconds: float
    title: str


PARTS = (
    Part("0", "benchmarks.gpu.ceilings", 15, "versions, card, and what it could do at most"),
    Part("A", "benchmarks.gpu.correctness", 70, "are the kernels right, and do they compile"),
    Part("B", "benchmarks.gpu.row_bits", 45, "does a row keep its bits among any others"),
    Part("C", "benchmarks.gpu.linears", 80, "linears in NF4, beside bitsandbytes"),
    Part("D", "benchmarks.gpu.mixing", 35, "attention beside torch's, deltas beside products row by row"),
    Part("E", "benchmarks.gpu.steps", 90, "steps of the engine"),
    Part("F", "benchmarks.gpu.peers", 50, "transformers with bitsandbytes, and PEFT"),
    Part("G", "benchmarks.gpu.cold", 20, "an adapter loaded while others decode"),
    Part("H", "benchmarks.gpu.sanitizer", 40, "memory and races, by compute-sanitizer"),
    Part("T", "benchmarks.gpu.training", 25, "steps of QLoRA"),
)
BUDGET_S = sum(part.seconds for part in PARTS)
_SHORTENED, _CUT = "E", "F"
"""Short of time, the one is shortened before the other is cut."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it all; 0 unless a part failed."""
    options = _parse(arguments)
    if not options.cpu and (problem := _problem()):
        print(f"{problem}; or give --cpu, which tries everything without a GPU", file=sys.stderr)
        return 1
    if options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="manyhats-gpu-"))
    options.out.mkdir(parents=True, exist_ok=True)
    scale = CPU if options.cpu else GPU
    if options.cpu:
        os.environ["TRITON_INTERPRET"] = "1"
    parts = [part for part in PARTS if part.name in options.only]
    run_parts(parts, scale, options.out, options.budget)
    found = {part.name: read(options.out, part.name) for part in parts}
    write_configuration(options.out, found)
    print(table(found, is_measured=scale.is_gpu))
    failed = [name for name, each in found.items() if each.failure]
    for name in failed:
        print(f"part {name} failed: {found[name].failure.strip().splitlines()[-1]}")
    print(f"everything is in {options.out}")
    return 1 if failed else 0


def _problem() -> str:
    """Why there is no GPU to measure; asked in another process, since this one's children must find it untouched."""
    code = "from manyhats.engine.backends.open import report_gpu; print(report_gpu().problem)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    lines = "\n".join(f"  {part.name}  {part.title} ({part.seconds:.0f} s)" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=f"{__doc__}\n\nparts:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the figures go (a new directory)")
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


def run_parts(
    parts: Sequence[Part],
    scale: Scale,
    directory: Path,
    budget_s: float,
    *,
    preload: str = _PRELOAD,
    end_s: float = _END_S,
) -> None:
    """Run them one after another; one that fails, hangs or dies ends alone.

    Args:
        parts: what to run.
        scale: on what.
        directory: where each leaves its file.
        budget_s: for all of them.
        preload: a module that is imported once for all.
        end_s: that a part has beyond its limit to come to an end by itself.
    """
    began_s = time.perf_counter()
    scaled = budget_s / sum(part.seconds for part in parts)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    for index, part in enumerate(parts):
        path_of(directory, part.name).unlink(missing_ok=True)
        left_s = budget_s - (time.perf_counter() - began_s)
        limit_s, is_short = limit_of(part, parts[index + 1 :], left_s, scaled)
        if limit_s <= 0:
            Recorder(directory, part.name, 0).lacks("all of it: the budget is spent")
            continue
        print(f"{part.name}  {part.title}; up to {limit_s:.0f} s", flush=True)
        process = context.Process(target=_run_part, args=(part, scale, directory, limit_s, is_short))
        process.start()
        process.join(limit_s + end_s)
        _end(process, directory, part, f"killed {end_s:.0f} s after its limit of {limit_s:.0f} s")


def limit_of(part: Part, after: Sequence[Part], left_s: float, scale: float) -> tuple[float, bool]:
    """Seconds that a part gets of what is left, and whether it is to be short.

    What earlier parts left over is a part's own; what they took too much is taken from part E, then from F, so that
    others keep what they need.

    Args:
        part: which is next.
        after: those that follow.
        left_s: of the budget.
        scale: the budget over what all parts of the run need.
    """
    own_s = part.seconds * scale
    spare_s = left_s - scale * sum(each.seconds for each in after)
    if part.name == _SHORTENED:
        return max(min(left_s, own_s / 3), spare_s), spare_s < own_s
    if part.name == _CUT:
        return max(0.0, spare_s), False
    return max(0.0, min(left_s, own_s), spare_s), False


def _end(process: multiprocessing.process.BaseProcess, directory: Path, part: Part, if_alive: str) -> None:
    """See that the process is gone, and that its file says so if it did not end by itself."""
    failure = if_alive if process.is_alive() else f"its process ended with {process.exitcode}"
    if process.is_alive():
        process.kill()
        process.join()
    elif process.exitcode == 0:
        return
    found = read(directory, part.name)
    found.failure = found.failure or failure
    write(directory, found)


def _run_part(part: Part, scale: Scale, directory: Path, limit_s: float, is_short: bool) -> None:
    """In the part's own process."""
    out = Recorder(directory, part.name, limit_s, is_short=is_short)
    try:
        importlib.import_module(part.module).run(out, scale)
    except Exception as error:  # noqa: BLE001 - whatever ends one part, the others go on
        if isinstance(error, ModuleNotFoundError) and not _is_ours(error):
            out.lacks(f"what needs {error.name}, which is not installed")
        else:
            out.fail(f"part {part.name}: {error!r}")
    finally:
        out.write()


def _is_ours(error: ModuleNotFoundError) -> bool:
    return (error.name or "").startswith(("benchmarks", "manyhats"))
