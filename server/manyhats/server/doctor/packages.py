"""Python and packages; imports neither those of the server nor any other, as they may be what is missing."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata

from manyhats.server.doctor.finding import Finding, failure, ok

_DISTRIBUTION = "manyhats"
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^\]]*\])?\s*(?P<versions>[^;]*)(;(?P<marker>.*))?")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
_LEAST = re.compile(r">=\s*([0-9.]+)")


def look_at_python() -> Iterator[Finding]:
    """Whether this Python is new enough."""
    version = platform.python_version()
    least = _LEAST.search(str(metadata.metadata(_DISTRIBUTION).json.get("requires_python", "")))
    if least is not None and sys.version_info[:2] < _numbers(least[1]):
        yield failure("Python", version, f"install Python {least[1]} or later, and manyhats in it")
    else:
        yield ok("Python", f"{version} on {platform.system()} {platform.machine()}")


def look_at_packages(extra: str) -> Iterator[Finding]:
    """Whether the packages of an extra are there, in versions that are new enough."""
    subject = f"packages of {_DISTRIBUTION}[{extra}]"
    advice = f"install {_DISTRIBUTION}[{extra}] from the checkout or wheel that it came from"
    if extra not in metadata.metadata(_DISTRIBUTION).json.get("provides_extra", ()):
        yield failure(subject, "this installation is too old to know them", advice)
        return
    missing, old, num_needed = [], [], 0
    for name, least in _needed(extra):
        num_needed += 1
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if _numbers(found) < _numbers(least):
            old.append(f"{name} {found} (needs {least})")
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"too old: {', '.join(old)}"] if old else []
    if parts:
        yield failure(subject, "; ".join(parts), advice)
    else:
        yield ok(subject, f"all {num_needed} are there")


def _needed(extra: str) -> Iterator[tuple[str, str]]:
    """Name and least version of the packages of an extra, and of those that every installation needs."""
    for text in metadata.requires(_DISTRIBUTION) or ():
        parts = _REQUIREMENT.fullmatch(text)
        of_extra = _EXTRA.search((parts and parts["marker"]) or "")
        if parts is not None and (of_extra is None or of_extra[1] == extra):
            least = _LEAST.search(parts["versions"])
            yield parts["name"], least[1] if least else "0"


def _numbers(version: str) -> tuple[int, ...]:
    """The version's leading numbers: 2.13 of 2.13.0+cpu, without zeros at the end, which mean nothing."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
