"""``manyhats adapters convert``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from manyhats.cli.main import app
from support.factories.adapterhub import adapterhub_config, adapterhub_tensors
from support.factories.adapters import make_base

BASE = make_base(names=("org/tiny",))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = adapterhub_config(BASE, "prefix_flat")
    ((name, table),) = adapterhub_tensors(BASE, config).items()
    again = name.replace("model.prefix_tuning.", "model.layers.0.self_attn.prefix_tuning.pool.")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    torch.save({name: table, again: table}, tmp_path / "old" / "pytorch_adapter.bin")
    return tmp_path / "old"


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["adapters", "convert", *args], prog_name="manyhats")


def test_help_has_an_example() -> None:
    assert "$ manyhats adapters convert" in run("--help").stdout


def test_converted_with_a_warning_and_then_inspected(source: Path, tmp_path: Path) -> None:
    result = run(str(source), str(tmp_path / "new"))
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: a pickle can run any code")
    assert result.stdout.startswith(
        f"converted: {tmp_path / 'new' / 'adapter.safetensors'} (1 tensors, 1 repeated"
    )
    shown = CliRunner().invoke(app, ["adapters", "inspect", str(tmp_path / "new")], prog_name="manyhats")
    assert "it would be accepted" in shown.stdout


def test_json_says_what_was_made(source: Path, tmp_path: Path) -> None:
    made = json.loads(run(str(source), str(tmp_path / "new"), "--json").stdout)
    assert made["target"] == str(tmp_path / "new" / "adapter.safetensors")
    assert (made["num_tensors"], made["num_repeated"]) == (1, 1)


def test_what_is_refused_fails(source: Path, tmp_path: Path) -> None:
    (source / "pytorch_adapter.bin").write_bytes(b"no pickle")
    result = run(str(source), str(tmp_path / "new"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: pytorch_adapter.bin: ")
    assert not (tmp_path / "new").exists()
