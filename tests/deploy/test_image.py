"""The Dockerfile's steps in a clean Debian, and the server that they make: unprivileged, on a read-only root."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from manyhats.client import Client
from support.factories.tiny_models import make_checkpoint
from support.servers.clean_root import CleanImage, download_wheels, missing

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(1800),  # two file systems are installed and removed
]


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Not pytest's, which would keep gigabytes, and which only root may enter."""
    path = Path(tempfile.mkdtemp(prefix="clean-root-"))
    path.chmod(0o755)
    yield path
    subprocess.run(["rm", "-rf", "--one-file-system", path], check=True)


@pytest.fixture(scope="module")
def image(directory: Path) -> CleanImage:
    (directory / "wheels").mkdir()
    download_wheels(directory / "wheels")
    return CleanImage(directory, directory / "wheels")


@pytest.fixture(scope="module")
def model(directory: Path) -> Path:
    made = make_checkpoint(directory / "model", dtype=torch.bfloat16)
    for file in made.iterdir():
        file.chmod(0o644)
    return made


@pytest.fixture
def volume(directory: Path) -> Path:
    """Empty, and the image's user's."""
    path = Path(tempfile.mkdtemp(dir=directory))
    os.chown(path, 10001, 10001)
    return path


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def server_of(process: subprocess.Popen[str]) -> int:
    """The server's process, below the one that made its namespace."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (child,) = children
    return int(child)


def test_the_server_answers_unprivileged_and_on_a_read_only_root(
    image: CleanImage, model: Path, volume: Path
) -> None:
    ports = {"MANYHATS_GRPC_PORT": free_port(), "MANYHATS_HTTP_PORT": free_port()}
    assert image.check_health(**ports) == 1
    with image.serving(volume, model, "--insecure", MANYHATS_MODEL="/mnt", **ports) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready, process.communicate()[1]
        assert json.loads(ready)["event"] == "ready"
        with Client(f"127.0.0.1:{ports['MANYHATS_GRPC_PORT']}", timeout_s=60) as client:
            assert client.generate("Hello", max_new_tokens=4).usage.generated_tokens > 0
        assert image.check_health(**ports) == 0
        server = server_of(process)
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{server}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"10001"}
        assert int(status["CapEff"], 16) == 0
        mounts = [line.split() for line in Path(f"/proc/{server}/mountinfo").read_text().splitlines()]
        assert next(fields[5] for fields in mounts if fields[4] == "/").startswith("ro")
        os.kill(server, signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert all(json.loads(line) for line in log.splitlines())
    assert {path.name for path in volume.iterdir()} >= {"cache", "store"}


def test_the_image_does_not_serve_others_unless_it_is_told_how(
    image: CleanImage, model: Path, volume: Path
) -> None:
    refused = subprocess.run(
        image.command(volume, model, ["manyhats", "serve"], MANYHATS_MODEL="/mnt"),
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "MANYHATS_HOST: 0.0.0.0 can be reached by other machines" in refused.stderr


def test_the_doctor_finds_nothing_that_will_not_work(image: CleanImage, model: Path, volume: Path) -> None:
    words = ["manyhats", "doctor", "--insecure", "--grpc-port", "0", "--http-port", "0", "--json"]
    looked = subprocess.run(
        image.command(volume, model, words, MANYHATS_MODEL="/mnt"), capture_output=True, text=True
    )
    assert looked.returncode == 0, looked.stdout + looked.stderr
    found = {each["subject"]: each["condition"] for each in json.loads(looked.stdout)}
    assert found["threads of the kernels"] == "ok"  # OpenMP is there
    assert found["packages of manyhats[server]"] == "ok"
