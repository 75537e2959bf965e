from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.fakes.client import FakeServer, running_server


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with running_server() as server:
        yield server
