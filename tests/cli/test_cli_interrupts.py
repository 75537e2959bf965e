"""Ctrl-C while a command gets ready: it ends at once, with a word, whatever it is at."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.factories.tiny_models import make_checkpoint

# Obeys interrupts even where the tests run in the background, and so ignore them.
INTERRUPTIBLE = [
    sys.executable,
    "-c",
    "import runpy, signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "runpy.run_module('manyhats.cli', run_name='__main__', alter_sys=True)",
]
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SERVE = ["serve", "--store", "store", "--grpc-port", "0", "--http-port", "0"]
# Far less than what the commands would wait for, and more than a busy machine needs to end a process.
LIMIT_S = 30


@contextmanager
def silent_index() -> Iterator[str]:
    """A package index that takes connections and never answers; its URL."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple"
        server.shutdown(socket.SHUT_RDWR)
    for each in held:
        each.close()


@contextmanager
def begun(
    place: Path, arguments: Sequence[str], sign: str, program: Sequence[str] = INTERRUPTIBLE, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """The command, once it has said ``sign`` on stderr."""
    environment = {**os.environ, "MANYHATS_HOME": str(place / "home"), **variables}
    with subprocess.Popen(
        [*program, *arguments],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            lines: list[str] = []
            for line in process.stderr:
                lines.append(line)
                if sign in line:
                    break
            assert sign in lines[-1], lines
            yield process
        finally:
            process.kill()


def assert_interrupted(process: subprocess.Popen[str]) -> None:
    printed, said = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, printed) == (130, ""), said
    assert said.splitlines().count("interrupted") == 1, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        [*SERVE, "--model", "smollm2-135m-instruct"],
        ["model", "fetch"],
        ["train", "lora", "--task", "t", "--data", "rows.jsonl", "--device", "cpu"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_interrupt_while_a_model_is_downloaded(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    with (
        silent_index() as url,
        begun(tmp_path, arguments, "download", PIP_INDEX_URL=url, PIP_CONFIG_FILE=os.devnull) as process,
    ):
        process.send_signal(signal.SIGINT)
        assert_interrupted(process)
    assert not (tmp_path / "home" / "models" / "smollm2-135m-instruct").exists()


def test_interrupt_of_the_examples_server_while_the_model_is_downloaded(tmp_path: Path) -> None:
    arguments = [str(EXAMPLES / "serve.py"), *SERVE[1:]]
    with (
        silent_index() as url,
        begun(
            tmp_path,
            arguments,
            "download",
            program=[sys.executable],
            PIP_INDEX_URL=url,
            PIP_CONFIG_FILE=os.devnull,
        ) as process,
    ):
        process.send_signal(signal.SIGINT)
        assert_interrupted(process)


def test_interrupt_while_kernels_are_compiled(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "tiny")
    with begun(tmp_path, [*SERVE, "--model", "tiny"], "compile") as process:
        process.send_signal(signal.SIGINT)
        assert_interrupted(process)


# Raises the interrupt where Python swallows it.
IN_A_FINALIZER = """
import os, signal, time
from manyhats.cli.terminal.interrupts import prompt_interrupts

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

signal.signal(signal.SIGINT, signal.default_int_handler)
with prompt_interrupts():
    Finalized()
    time.sleep(60)
"""


def test_interrupt_where_python_swallows_it() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", IN_A_FINALIZER], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")
