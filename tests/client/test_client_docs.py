"""The Python programs of docs/clients.md that use the client: they run as they stand, on a fake server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.fakes.client import FakeServer

DOCUMENT = Path(__file__).parents[2] / "docs" / "clients.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
PROGRAMS = [block for block in BLOCKS if "manyhats.client" in block]


def test_there_are_programs() -> None:
    assert len(PROGRAMS) >= 2


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_runs(fake: FakeServer, program: str) -> None:
    exec(program.replace("127.0.0.1:50051", fake.target), {})
    assert len(fake.requests) >= 2
