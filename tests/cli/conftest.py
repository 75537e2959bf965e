from __future__ import annotations

from collections.abc import Iterator

import pytest

from manyhats.v1 import generation_pb2
from support.fakes.client import FakeServer, running_server


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with running_server() as server:
        server.stream_finish_reason = generation_pb2.FINISH_REASON_EOS
        yield server
