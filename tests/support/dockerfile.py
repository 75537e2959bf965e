"""The instructions of the project's Dockerfile, and the settings that its image has."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Stage:
    """What follows a FROM: instructions in order, each its name and what follows it on one line."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def last(self, name: str) -> str:
        return [rest for instruction, rest in self.instructions if instruction == name][-1]

    @property
    def variables(self) -> dict[str, str]:
        """Those of ENV; values may use variables that a shell replaces."""
        words = [word for name, rest in self.instructions if name == "ENV" for word in shlex.split(rest)]
        return dict(word.split("=", 1) for word in words)

    @property
    def entry_point(self) -> list[str]:
        return list(json.loads(self.last("ENTRYPOINT")))

    @property
    def health_check(self) -> list[str]:
        """The command of HEALTHCHECK."""
        return list(json.loads(self.last("HEALTHCHECK").partition("CMD ")[2]))


def stages() -> list[Stage]:
    """The Dockerfile's."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: list[Stage] = []
    for line in filter(str.strip, text.replace("\\\n", " ").splitlines()):
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            found.append(Stage(rest.split()[0]))
        else:
            found[-1].instructions.append((name, " ".join(rest.split())))
    return found
