"""``manyhats adapters inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from adapter_factory import make_base, make_lora
from adapterhub_factory import make_adapterhub
from manyhats.cli.adapter_files import layer_ranges
from manyhats.cli.main import app
from tiny_models import make_checkpoint

BASE = make_base(names=("org/tiny",))


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["adapters", "inspect", *args], prog_name="manyhats")


def test_help_has_an_example() -> None:
    assert "$ manyhats adapters inspect" in run("--help").stdout


def test_method_sites_and_size_are_printed(tmp_path: Path) -> None:
    make_lora(tmp_path / "a", BASE, rank=2, sites=["q_proj"])
    result = run(str(tmp_path / "a"))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "method: lora" in lines
    assert "base model: org/tiny" in lines
    assert "q_proj\tLowRank\t0-1\t2\ta [2, 32], b [32, 2]" in lines
    assert "note: nothing was compared with a base model" in result.stdout
    assert lines[-1] == "nothing would be refused"


def test_refusals_are_printed_with_reason_and_key(tmp_path: Path) -> None:
    make_adapterhub(tmp_path / "a", BASE, "seq_bn", use_gating=True)
    result = run(str(tmp_path / "a"))
    assert result.exit_code == 0
    assert "would be refused: ADAPTER_UNSUPPORTED use_gating: asks for a gate" in result.stdout


def test_a_base_is_compared_with_by_its_config_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    make_lora(tmp_path / "a", make_base(names=("",)), sites=["q_proj"])
    result = run(str(tmp_path / "a"), "--model", str(tmp_path / "model"))
    assert result.exit_code == 0
    assert "would be refused: BASE_MISMATCH" in result.stdout
    assert "expected [rank, 64]" in result.stdout


def test_json_is_the_whole_inspection(tmp_path: Path) -> None:
    make_adapterhub(tmp_path / "a", BASE, "prefix_flat", prefix_length=3)
    found = json.loads(run(str(tmp_path / "a"), "--json").stdout)
    assert (found["format"], found["method"], found["num_virtual_tokens"]) == (
        "adapterhub",
        "prefix_tuning",
        3,
    )
    assert found["config"]["config"]["flat"] is True
    assert found["tensors"][0]["shape"] == [3 * 2 * 2 * 2 * 8]
    assert found["refusals"] == []


@pytest.mark.parametrize("args", [["nothing"], ["a", "--model", "no such model"]])
def test_what_is_not_there_is_one_line_on_stderr(
    tmp_path: Path, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_lora(tmp_path / "a", BASE)
    result = run(*args)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("layers", "text"), [((), ""), ((3,), "3"), ((0, 1, 2), "0-2"), ((0, 1, 4, 6, 7), "0-1, 4, 6-7")]
)
def test_layers_are_printed_as_ranges(layers: tuple[int, ...], text: str) -> None:
    assert layer_ranges(layers) == text
