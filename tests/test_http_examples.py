"""The calls that README and docs show: they run as they stand, against a server of fakes."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyhats.adapters.heads import TaskKind
from manyhats.engine.output import Usage
from manyhats.server.service.call import Call
from manyhats.server.service.classification import Classified
from manyhats.server.service.generations import Generations
from support.fakes.server import make_record, running_server

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/http.md", "docs/quickstart.md")
OF_THE_CLIENT = ("README.md", "docs/quickstart.md", "docs/reference/python-client.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TASKS = ("sql", "pirate", "sentiment", "topics")
# Those with a head, and its classes.
CLASSIFIERS = {"mood": {"class.0": "good", "class.1": "bad"}, "relevance": {}}


def blocks(document: str) -> Iterator[tuple[str, str]]:
    """Language and text of each block of code."""
    for match in BLOCK.finditer((ROOT / document).read_text(encoding="utf-8")):
        yield match[1], match[2]


def programs() -> list[tuple[str, str]]:
    return [
        (name, text)
        for name in DOCUMENTS
        for kind, text in blocks(name)
        if kind == "python" and "openai" in text
    ]


def client_programs() -> list[tuple[str, str]]:
    return [
        (name, text)
        for name in OF_THE_CLIENT
        for kind, text in blocks(name)
        if kind == "python" and "manyhats.client" in text
    ]


def curls() -> list[tuple[str, str]]:
    """Calls by ``curl`` with a body on the command line."""
    found = []
    for name in DOCUMENTS:
        for kind, text in blocks(name):
            if kind in ("sh", "console"):
                joined = text.replace("\\\n", " ")
                lines = [line.removeprefix("$ ") for line in joined.splitlines()]
                found += [(name, line) for line in lines if line.startswith("curl ") and " -F " not in line]
    return found


@pytest.fixture(autouse=True)
def classes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def classify(self: Generations, call: Call, texts: list[str]) -> list[Classified]:
        return [Classified(("a", "b"), (0.25, 0.75), 1, Usage())] * len(texts)

    monkeypatch.setattr(Generations, "classify", classify)


def test_the_documents_have_calls() -> None:
    assert {name for name, _ in programs()} == set(DOCUMENTS[:2])
    assert {name for name, _ in curls()} == set(DOCUMENTS)
    assert {name for name, _ in client_programs()} == set(OF_THE_CLIENT)


@pytest.mark.parametrize(("document", "program"), programs())
async def test_a_program_runs(document: str, program: str) -> None:
    async with running_server() as server:
        for task in TASKS:
            server.store.tasks[task] = [make_record(task)]
        text = program.replace("127.0.0.1:8000", server.http)
        assert text != program
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", text],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "How many customers live in Lisbon?" in done.stdout


@pytest.mark.parametrize(("document", "program"), client_programs())
async def test_a_program_of_the_client_runs(document: str, program: str) -> None:
    async with running_server() as server:
        server.store.tasks["sql"] = [make_record("sql")]
        text = program.replace("127.0.0.1:50051", server.port.address)
        assert text != program
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", text],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "How many customers live in Lisbon?" in done.stdout


@pytest.mark.parametrize(("document", "line"), curls())
async def test_a_curl_is_answered(document: str, line: str) -> None:
    async with running_server() as server:
        for task in TASKS:
            server.store.tasks[task] = [make_record(task, version) for version in (1, 2)]
        for task, labels in CLASSIFIERS.items():
            server.store.tasks[task] = [make_record(task, labels=labels, kind=TaskKind.CLASSIFY)]
        words = shlex.split(line.replace("localhost:8000", server.http))
        done = await asyncio.to_thread(
            subprocess.run,
            ["curl", "--silent", "--show-error", "--fail-with-body", *words[1:]],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
