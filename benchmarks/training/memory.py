"""``python -m benchmarks.training.memory``: what ``--dry-run`` predicts, and what a fresh process that trains takes.

Models of random weights and two sizes besides the default one, three methods, some batches. A training is the command
itself; its peak is the most memory that the system saw it hold, its runtime and libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

DEFAULT_MODEL = "smollm2-135m-instruct"
METHODS = ("qlora", "bottleneck", "prefix")
_MIB = 2**20
_ROWS_PER_BATCH = 3
_NUM_STEPS = 3


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama's shape; ``num_layers`` 0 is the default model."""

    name: str
    hidden_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    intermediate_size: int = 0


SIZES = (
    Size("33M", 384, 8, 6, 2, 1024),
    Size("135M"),
    Size("352M", 1024, 24, 16, 8, 2816),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a step, and the tokens of the longest; rows have from half of that on."""

    num_rows: int
    longest: int


BATCHES = (Batch(4, 64), Batch(8, 256))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Bytes."""

    size: str
    method: str
    batch: Batch
    phase: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """The prediction's, as a share of what was measured."""
        return self.predicted / self.measured - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per case, and the largest error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", choices=[size.name for size in SIZES])
    parser.add_argument("--method", action="append")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    sizes = [size for size in SIZES if not options.size or size.name in options.size]
    with TemporaryDirectory(prefix="manyhats-bench-") as directory:
        compared = list(
            compare(Path(directory), sizes, options.method or METHODS, options.dtype, quiet=options.json)
        )
    if options.json:
        print(json.dumps([{**asdict(each), "error": each.error} for each in compared], indent=1))
    else:
        print(f"largest error: {max(abs(each.error) for each in compared):.1%}")
    return 0


def compare(
    directory: Path, sizes: Sequence[Size], methods: Sequence[str], dtype: str, *, quiet: bool
) -> Iterator[Comparison]:
    """Predict and measure every case, one after another."""
    for size in sizes:
        model = DEFAULT_MODEL if not size.num_layers else str(make_model(directory / size.name, size))
        for batch in BATCHES:
            data = write_rows(directory / f"{batch.num_rows}x{batch.longest}.jsonl", batch)
            for method in methods:
                out = directory / "out"
                command = _command(model, method, data, batch, dtype, out)
                prediction = json.loads(_output([*command, "--dry-run"]))
                case = Comparison(
                    size=size.name,
                    method=method,
                    batch=batch,
                    phase=str(prediction["phase"]),
                    predicted=int(prediction["total_bytes"]),
                    measured=peak_of(command),
                )
                shutil.rmtree(out)
                if not quiet:
                    print(line_of(case), flush=True)
                yield case


def line_of(case: Comparison) -> str:
    """One case as a line."""
    batch = f"{case.batch.num_rows} x {case.batch.longest}"
    return (
        f"{case.size:>5} {case.method:<11} {batch:>9}: predicted {case.predicted / _MIB:7.1f} MiB "
        f"({case.phase}), measured {case.measured / _MIB:7.1f} MiB: {case.error:+.1%}"
    )


def make_model(directory: Path, size: Size) -> Path:
    """Save a model of random bfloat16 weights, with the default model's tokenizer."""
    subprocess.run(
        [sys.executable, "-m", "benchmarks.random_model", str(directory), json.dumps(asdict(size))],
        check=True,
    )
    return directory


def write_rows(path: Path, batch: Batch) -> Path:
    """Texts of the lengths of a batch: each word here is one token of the default tokenizer."""
    words = (" the", " of", " and", " to", " in", " is", " that", " for", " with", " as")
    choose = random.Random(0)
    lengths = [
        choose.randint(batch.longest // 2, batch.longest - 1) for _ in range(_ROWS_PER_BATCH * batch.num_rows)
    ]
    lengths[0] = batch.longest - 1
    with path.open("w") as file:
        for length in lengths:
            file.write(json.dumps({"text": "".join(choose.choices(words, k=length))}) + "\n")
    return path


def _command(model: str, method: str, data: Path, batch: Batch, dtype: str, out: Path) -> list[str]:
    flags = f"--task memory --model {model} --data {data} --batch-size {batch.num_rows} --dtype {dtype}"
    flags += f" --max-steps {_NUM_STEPS} --device cpu --out {out} --json"
    return [sys.executable, "-m", "manyhats.cli", "train", method, *flags.split()]


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def peak_of(command: Sequence[str]) -> int:
    """The most resident memory of a command's process, in bytes.

    Raises:
        RuntimeError: it fails; with the end of what it said.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {errors[-500:]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    raise SystemExit(main())
