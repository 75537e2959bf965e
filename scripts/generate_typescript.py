"""Generates the TypeScript code of the API, ``clients/typescript/src/gen``; run ``npm ci`` there first.

Run it after changing a .proto file. With ``--check`` it writes nothing, shows how the committed code differs
from what would be generated, and exits 1 if it does.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import protoc
from generate_proto import PACKAGE
from generate_proto import ROOT as PROTO
from generated_file import compare

CLIENT = PROTO.parent / "clients" / "typescript"
OUT = CLIENT / "src" / "gen"
PLUGIN = CLIENT / "node_modules" / ".bin" / "protoc-gen-es"


def generate(out: Path) -> None:
    """Writes the code of the API, and of the details of its errors, under ``out``.

    Raises:
        SystemExit: the compiler or its plugin is missing or refused a file; it has said why on stderr.
    """
    if not PLUGIN.exists():
        raise SystemExit(f"{PLUGIN} is missing: run `npm ci` in {CLIENT}")
    own = CLIENT / "proto"
    sources = sorted(path.relative_to(PROTO).as_posix() for path in (PROTO / PACKAGE).glob("*.proto"))
    sources += sorted(path.relative_to(own).as_posix() for path in own.rglob("*.proto"))
    out.mkdir(parents=True, exist_ok=True)
    protoc.run(
        PROTO,
        f"--proto_path={own}",
        f"--plugin=protoc-gen-es={PLUGIN}",
        f"--es_out={out}",
        "--es_opt=target=ts,import_extension=js",
        sources=sources,
    )


def generated_files(root: Path) -> dict[str, str]:
    """Text of each generated file under ``root``, by its path."""
    return {path.relative_to(root).as_posix(): path.read_text() for path in sorted(root.rglob("*.ts"))}


def check() -> int:
    """Compares the committed code with freshly generated code; 1 if they differ."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        wanted = generated_files(Path(folder))
    complaint = "generated code differs from the .proto files: run scripts/generate_typescript.py"
    return compare(generated_files(OUT), wanted, "generated", complaint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Regenerates in place, or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description="Generates the TypeScript code of the .proto files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference")
    if parser.parse_args(arguments).check:
        return check()
    shutil.rmtree(OUT, ignore_errors=True)
    generate(OUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
