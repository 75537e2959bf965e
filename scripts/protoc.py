"""The compiler of .proto files, apart from the environment: it is older than the packages that are developed with.

What it generates asks for its own versions of grpcio and protobuf (6.31) or later ones, so the client's lowest versions
follow from it. It is the first release with wheels for Python 3.14.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPILER = "grpcio-tools==1.75.1"
HOME = Path(__file__).resolve().parents[1] / ".protoc"


def installed() -> Path:
    """The folder with the compiler; fetched by pip if it is not there."""
    folder = HOME / COMPILER
    if not folder.exists():
        HOME.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=HOME) as scratch:
            made = Path(scratch) / "made"
            # Its dependencies are for generating at run time.
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(made)]
            subprocess.run([*pip, COMPILER], check=True)
            if not folder.exists():  # another process may have been faster
                made.rename(folder)
    return folder


def run(root: Path, *arguments: str, sources: Sequence[str]) -> None:
    """Compile ``sources``, which are names below ``root``.

    Raises:
        SystemExit: the compiler refused a file; it has said why on stderr.
    """
    home = installed()
    # The plugins behind mypy_out and mypy_grpc_out are scripts of this environment.
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"
    includes = [f"--proto_path={root}", f"--proto_path={home / 'grpc_tools/_proto'}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", *includes, *arguments, *sources]
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(home),
        "GRPC_PYTHON_DISABLE_DYNAMIC_STUBS": "1",
    }
    result = subprocess.run(command, env=environment, check=False)
    if result.returncode != 0:
        raise SystemExit(result.returncode)


if __name__ == "__main__":
    installed()
