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


def test_an_adapter_root_that_is_not_there_is_a_warning(make: Make, tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    found = list(
        examination.examine(make(model="/no/such/model", adapter_roots=(root,), grpc_port=0, http_port=0))
    )
    (finding,) = [each for each in bad(found) if each.subject == "adapter roots"]
    assert finding.condition.value == "warning"
    assert str(root) in finding.text


def test_a_store_that_cannot_be_made_is_a_failure_for_any_user(make: Make) -> None:
    found = list(
        examination.examine(make(model="/no/such/model", store="/proc/none/store", grpc_port=0, http_port=0))
    )
    (finding,) = [each for each in bad(found) if each.subject == "store"]
    assert finding.condition.value == "failure"
    assert "/proc cannot be written" in finding.text
