"""The packages that are needed, from pyproject.toml and constraints.txt."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from references.markdown import table

ROOT = Path(__file__).resolve().parents[2]
_TITLES = {
    "server": "The server",
    "train": "The trainer, besides the server's",
    "otel": "Traces",
    "postgres": "Tasks and versions in PostgreSQL",
    "s3": "Adapters in S3",
    "gcs": "Adapters in GCS",
    "frame": "Data frames of pandas",
    "polars": "Data frames of Polars",
}


def markdown() -> str:
    """A table for the client, and one for each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = map(Requirement, (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:])
    tested = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    parts = [_table("The client and the command line", project["dependencies"], tested)]
    for extra, lines in project["optional-dependencies"].items():
        if extra not in ("dev", "docs", "ray"):  # Ray is tested in an environment of its own: docs/ray.md
            parts.append(_table(f"{_TITLES.get(extra, extra)}: `[{extra}]`", lines, tested))
    return "\n".join(parts)


def _table(title: str, lines: Sequence[str], tested: Mapping[NormalizedName, str]) -> str:
    found = [each for each in map(Requirement, lines) if each.name != "manyhats"]
    rows = [
        (f"`{each.name}`", str(each.specifier), tested.get(canonicalize_name(each.name), "not tested"))
        for each in found
    ]
    return f"## {title}\n\n{table('package', 'needed', 'tested with', rows=rows)}"
