from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

from manyhats.engine.threads.openmp import sleep_soon
from support.servers.postgres import PostgresServer
from support.servers.s3 import Bucket, S3Server

if os.environ.get("MANYHATS_DEVICE", "cpu") == "cpu":
    # Before any test imports Triton, as libraries do that find it: its own functions are interpreted or compiled, too.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sleep_soon()  # before any test imports torch: on a busy machine the tests would take ten times as long
settings.register_profile("untimed", deadline=None)  # how long an example takes depends on what else runs
settings.load_profile("untimed")
if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)  # other processes keep the other processors busy


def pytest_addoption(parser: pytest.Parser) -> None:
    backends = ("cpu", "torch", "torch-batched", "torch-ahead")
    parser.addoption("--backend", choices=backends, default="cpu", help="what the engine runs on")
    parser.addoption("--screenshots", action="store_true", help="write those of the page to docs/")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["ENGINE_TEST_BACKEND"] = config.getoption("--backend")  # read where torch may be imported


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    name = config.getoption("--backend")
    if name == "torch-batched" or (name == "torch" and os.environ.get("MANYHATS_DEVICE", "cpu") != "cpu"):
        skip = pytest.mark.skip(reason="rounds rows as their number has it")
        for item in items:
            if item.get_closest_marker("bits"):
                item.add_marker(skip)


@pytest.fixture
def own_logs() -> Iterator[None]:
    """Undoes the configuration of logs."""
    root, ours = logging.getLogger(), logging.getLogger("manyhats")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL, started once; tests that ask for it are marked ``postgres``."""
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """An empty database of its own."""
    return postgres_server.new_database()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 endpoint, started once."""
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def bucket(s3_server: S3Server) -> Bucket:
    """An empty bucket of its own."""
    return s3_server.new_bucket()
