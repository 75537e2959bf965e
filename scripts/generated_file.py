"""A file of the repository that follows from the code: written anew, or checked."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_or_check(file: Path, wanted: str, script: str, arguments: Sequence[str] | None = None) -> int:
    """Write what the code says; with ``--check`` write nothing, show how the file differs, and return 1 if it does.

    Args:
        file: below the repository's root.
        wanted: its whole text.
        script: the one that is run.
        arguments: of the command line; None for the process's.

    Returns:
        The exit code.
    """
    name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
    parser = argparse.ArgumentParser(description=f"Writes {name} from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference")
    if not parser.parse_args(arguments).check:
        file.write_text(wanted, encoding="utf-8")
        return 0
    committed = {file.name: file.read_text(encoding="utf-8")}
    return compare(
        committed, {file.name: wanted}, "declared", f"{name} differs from the code: run scripts/{script}"
    )


def compare(committed: Mapping[str, str], wanted: Mapping[str, str], origin: str, complaint: str) -> int:
    """Show how files differ from what they should be.

    Args:
        committed: text of each, by name.
        wanted: the same.
        origin: of what is wanted, in a word.
        complaint: for stderr, if they differ.

    Returns:
        1 if they differ, as an exit code.
    """
    lines: list[str] = []
    for name in sorted(committed.keys() | wanted.keys()):
        before = committed.get(name, "").splitlines(keepends=True)
        after = wanted.get(name, "").splitlines(keepends=True)
        lines += difflib.unified_diff(before, after, f"committed/{name}", f"{origin}/{name}")
    sys.stdout.writelines(lines)
    if lines:
        sys.stderr.write(f"{complaint}\n")
    return 1 if lines else 0
