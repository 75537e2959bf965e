"""Bars of long calls: drawn at a terminal, nowhere else."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from manyhats.client import Client
from support.fakes.client import FakeServer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(4998))
    return tmp_path


def test_a_bar_at_a_terminal(fake: FakeServer) -> None:
    with redirect_stderr(Terminal()) as terminal, Client(fake.target) as client:
        client.generate_many(["a"] * 7)
    assert "prompts" in terminal.getvalue()
    assert "7/7" in terminal.getvalue()


def test_a_bar_of_an_upload(fake: FakeServer, adapter: Path) -> None:
    with redirect_stderr(Terminal()) as terminal, Client(fake.target) as client:
        client.upload_adapter("sql", adapter, progress=True)
    assert "upload" in terminal.getvalue()
    assert "5.0/5.0 kB" in terminal.getvalue()


def test_no_bar_if_none_is_wanted(fake: FakeServer, adapter: Path) -> None:
    with redirect_stderr(Terminal()) as terminal, Client(fake.target) as client:
        client.generate_many(["a"] * 7, progress=False)
        client.upload_adapter("sql", adapter)
    assert terminal.getvalue() == ""


def test_no_bar_where_there_is_no_terminal(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(fake.target) as client:
        client.generate_many(["a"] * 7)
    assert capsys.readouterr() == ("", "")
