"""Generates the Python code of ``proto/manyhats/v1/*.proto``.

Run it after changing a .proto file. With ``--check`` it writes nothing, shows how the committed code differs
from what would be generated, and exits 1 if it does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import protoc
from generated_file import compare

ROOT = Path(__file__).resolve().parent.parent / "proto"
PACKAGE = Path("manyhats/v1")


def generate(out: Path) -> None:
    """Writes messages, stubs and their types for every .proto file under ``out``.

    Raises:
        SystemExit: the compiler refused a file; it has said why on stderr.
    """
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).glob("*.proto"))
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    protoc.run(ROOT, *(f"--{kind}_out={out}" for kind in kinds), sources=sources)


def generated_files(root: Path) -> dict[str, str]:
    """Text of each generated file under ``root``, by its name."""
    return {path.name: path.read_text() for path in sorted((root / PACKAGE).glob("*_pb2*.py*"))}


def check() -> int:
    """Compares the committed code with freshly generated code; 1 if they differ."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        wanted = generated_files(Path(folder))
    complaint = "generated code differs from the .proto files: run scripts/generate_proto.py"
    return compare(generated_files(ROOT), wanted, "generated", complaint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Regenerates in place, or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description="Generates the Python code of the .proto files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference")
    if parser.parse_args(arguments).check:
        return check()
    for path in (ROOT / PACKAGE).glob("*_pb2*.py*"):
        path.unlink()
    generate(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
