"""A real PostgreSQL for tests: its own data directory, on a Unix socket, with nothing kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

_INSTALL = (
    "PostgreSQL's server programs are missing. Install them ('apt-get install postgresql'), "
    "or leave these tests out on purpose: pytest -m 'not postgres'"
)


class PostgresServer:
    """Runs until ``close``; each test makes a database of its own."""

    def __init__(self) -> None:
        self._programs = find_programs()
        # Short, for the socket's path has a limit; and not below a directory that is another user's alone.
        self._directory = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._num_databases = 0
        # The server refuses to run as root.
        self._user: dict[str, Any] = {"user": "nobody", "extra_groups": []} if os.getuid() == 0 else {}
        if self._user:
            shutil.chown(self._directory, "nobody")
        data = str(self._directory / "data")
        self._run(
            "initdb", "--pgdata", data, "--username=test", "--auth=trust", "--no-sync", "--encoding=UTF8"
        )
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = f"-c listen_addresses= -c unix_socket_directories={self._directory} -c fsync=off"
        self._control("start", "--log", str(self._directory / "log"), "--options", options)

    def stop(self) -> None:
        """End at once, as a machine that dies."""
        self._control("stop", "--mode=immediate")

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Out of reach within the block."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the block it takes connections and says nothing, as on a machine that hangs."""
        main = int((self._directory / "data" / "postmaster.pid").read_text().split()[0])
        children = (Path(f"/proc/{main}/task/{main}/children")).read_text().split()
        processes = [main, *map(int, children)]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)

    def new_database(self) -> str:
        """An empty database; gives its URL."""
        self._num_databases += 1
        name = f"test_{self._num_databases}"
        with psycopg.connect(
            host=str(self._directory), user="test", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql+psycopg://test@/{name}?host={quote(str(self._directory), safe='')}"

    def close(self) -> None:
        """Stop, and remove everything."""
        self.stop()
        shutil.rmtree(self._directory)

    def _control(self, action: str, *arguments: str) -> None:
        self._run(
            "pg_ctl", action, "--pgdata", str(self._directory / "data"), "--wait", "--silent", *arguments
        )

    def _run(self, program: str, *arguments: str) -> None:
        # Not a pipe: the server inherits it and never closes it.
        with open(self._directory / f"{program}.log", "a+b") as output:
            done = subprocess.run(
                [self._programs / program, *arguments],
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                **self._user,
            )
            output.seek(0)
            assert done.returncode == 0, f"{program}: {output.read().decode()}"


def find_programs() -> Path:
    """The directory of ``initdb`` and ``pg_ctl``: of the latest version that Debian installed, or on the path.

    Raises:
        RuntimeError: there is none.
    """
    installed = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3])
    )
    on_path = shutil.which("initdb")
    if not installed and on_path is None:
        raise RuntimeError(_INSTALL)
    return installed[-1].parent if installed else Path(str(on_path)).parent
