"""Requests that end in every way leave nothing: ``make churn``, with few of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from churn.__main__ import churn
from churn.watching import Ends
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.loop.job import Event
from manyhats.engine.loop.streams import Streams
from manyhats.engine.residency.lease import Lease
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import load_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("churn") / "model"))


def test_requests_that_end_in_every_way_leave_nothing(model: LoadedModel, tmp_path: Path) -> None:
    seed = 20
    print(f"seed {seed}")
    said = asyncio.run(churn(model, tmp_path, 600, seed))
    assert said.endswith("nothing left")
    for end in ("read", "left", "given up", "scored", "DeadlineExceededError"):
        assert end in said


def test_a_lease_that_is_kept_is_found(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, kept = Lease.release, []

    def forgetful(self: Lease) -> None:
        if self.on_release is not None and not kept:
            kept.append(self)
            return
        release(self)

    monkeypatch.setattr(Lease, "release", forgetful)
    with pytest.raises(Exception, match=r"requests are running on it|left when all had ended"):
        asyncio.run(churn(model, tmp_path, 60, 1))


def test_a_second_end_is_counted() -> None:
    class Loop:
        streams: Any = Streams()

    class Engine:
        loop = Loop()

    ends, engine = Ends(), Engine()
    engine.loop.streams.publish = lambda events: True
    ends.watch(engine)  # type: ignore[arg-type]
    event = Event("1", None, True)
    engine.loop.streams.publish([event])
    engine.loop.streams.publish([event])
    assert (ends.told["ends"], ends.told["after the end"]) == (2, 1)
