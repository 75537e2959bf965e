"""The whole examination: what hangs or fails in one look does not keep the others from being made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from manyhats.adapters.store.opening import open_store
from manyhats.server.doctor import examination
from support.factories.adapters import make_base
from support.harnesses.doctor import Make, bad, conditions


def test_a_store_that_hangs_is_a_failure_and_the_rest_is_still_looked_at(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(tmp_path / "store", make_base()).close()
    (claim,) = (tmp_path / "store").rglob("catalogue-id")
    claim.unlink()
    os.mkfifo(claim)  # whoever reads it waits until somebody writes
    monkeypatch.setattr(examination, "_HANG_S", 0.5)
    config = make(model="/no/such/model", grpc_port=0, http_port=0)
    found = list(examination.examine(config))
    claim.write_text("nobody's")
    assert [(each.subject, each.condition.value) for each in bad(found)] == [
        ("model", "failure"),
        ("store", "failure"),
    ]
    assert "has not answered" in bad(found)[1].text
    assert {("tokens", "ok"), ("TLS", "ok"), ("gRPC port", "ok"), ("open files", "ok")} <= set(
        conditions(found)
    )


def test_a_server_that_runs_has_its_ports(make: Make) -> None:
    config = make(model="/no/such/model", grpc_port=1, http_port=2, host="192.0.2.1", insecure=True)
    subjects = [each.subject for each in examination.examine(config, is_running=True)]
    assert not [subject for subject in subjects if "port" in subject]
