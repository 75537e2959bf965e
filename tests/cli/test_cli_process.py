"""The command as a process: streams, exit codes, signals, terminals, imports."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import manyhats
from support.fakes.client import TEXT, FakeServer

COMMAND = [sys.executable, "-m", "manyhats.cli"]
# The same, obeying interrupts even where the tests run in the background, and so ignore them.
INTERRUPTIBLE = [
    sys.executable,
    "-c",
    "import runpy, signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "runpy.run_module('manyhats.cli', run_name='__main__', alter_sys=True)",
]

PROGRESS = """
from manyhats.cli.terminal.progress import shown_progress
with shown_progress() as report:
    report("quantize", 1, 2)
    report("quantize", 2, 2)
"""
LOADED_BY_HELP = """
import sys
from manyhats.cli.main import app
try:
    app(["--help"])
except SystemExit as end:
    heavy = {"torch", "transformers", "numpy", "pydantic", "structlog", "yaml", "grpc", "google.protobuf"}
    print(end.code, sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""


def run(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *args], input=stdin, capture_output=True, text=True, timeout=60)


@contextmanager
def terminal(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Runs the command at a pseudo-terminal; gives the process and the terminal's other end."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def read_until(descriptor: int, expected: str, timeout_s: float = 30.0) -> str:
    """What the terminal shows, without its control sequences, until ``expected`` is there or it closes."""
    shown = b""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            shown += os.read(descriptor, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if expected in plain(shown):
            break
    assert expected in plain(shown), plain(shown)
    return plain(shown)


def plain(shown: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace")).replace("\r", "")


@pytest.mark.parametrize("module", ["manyhats", "manyhats.cli"])
def test_the_package_runs_as_the_command(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, f"manyhats {manyhats.__version__}\n", "")


def test_answer_on_stdout_and_nothing_on_stderr(fake: FakeServer) -> None:
    result = run("generate", "-", "--json", "--server", fake.target, stdin="hi")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["text"] == TEXT


def test_error_on_stderr_and_nothing_on_stdout() -> None:
    result = run("generate", "hi", "--server", "127.0.0.1:1")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"error: .*127\.0\.0\.1:1.*\n", result.stderr)


def test_interrupt_in_a_stream_cancels_it_and_exits_130(fake: FakeServer) -> None:
    fake.is_endless = True
    args = [*INTERRUPTIBLE, "generate", "hi", "--stream", "--server", fake.target]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b"Hello"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert b"Traceback" not in process.stderr.read()
    assert fake.stream_ended.wait(timeout=5)


def test_reader_that_leaves_ends_the_stream(fake: FakeServer) -> None:
    fake.is_endless = True
    args = [*INTERRUPTIBLE, "generate", "hi", "--stream", "--server", fake.target]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.wait(timeout=30) != 0
        assert b"Traceback" not in process.stderr.read()
    assert fake.stream_ended.wait(timeout=5)


def test_chat_at_a_terminal(fake: FakeServer) -> None:
    with terminal([*INTERRUPTIBLE, "chat", "--task", "sql", "--server", fake.target]) as (process, screen):
        assert "sql@2: /reset forgets" in read_until(screen, "> ")
        os.write(screen, b"hello\n")
        assert TEXT in read_until(screen, "> ")
        fake.is_endless = True
        os.write(screen, b"more\n")
        read_until(screen, "Hello")
        process.send_signal(signal.SIGINT)
        read_until(screen, "> ")
        assert fake.stream_ended.wait(timeout=5)
        os.write(screen, b"/exit\n")
        assert process.wait(timeout=30) == 0


def test_table_is_drawn_at_a_terminal(fake: FakeServer) -> None:
    with terminal([*INTERRUPTIBLE, "adapters", "list", "--server", fake.target]) as (process, screen):
        shown = read_until(screen, "tldr@1")
        assert "│ sql@1" in shown
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("command", [["generate", "hi"], ["score", "hi", "a"]])
def test_at_a_terminal_an_answer_is_seen_to_be_waited_for(fake: FakeServer, command: list[str]) -> None:
    fake.delay_s = 1.0
    with terminal([*INTERRUPTIBLE, *command, "--server", fake.target]) as (process, screen):
        read_until(screen, "waiting")
        read_until(screen, TEXT if command[0] == "generate" else "per token")
        assert process.wait(timeout=30) == 0


def test_progress_is_a_bar_at_a_terminal() -> None:
    with terminal([sys.executable, "-c", PROGRESS]) as (process, screen):
        assert "━" in read_until(screen, "2 / 2")
        assert process.wait(timeout=30) == 0


def test_help_imports_nothing_heavy() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LOADED_BY_HELP], capture_output=True, text=True, check=True
    )
    assert result.stderr == "0 []\n"


@pytest.mark.parametrize("command", [["serve", "--model", "m", "--store", "s"], ["model", "info"]])
def test_without_the_servers_packages_a_line_says_what_to_install(command: list[str]) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, structlog=None); from manyhats.cli.main import app; app()"
    )
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(
        r"error: .*pip install -c constraints\.txt --editable '\.\[server\]' in \S+\n", result.stderr
    )
