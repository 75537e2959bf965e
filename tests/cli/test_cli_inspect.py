"""``manyhats adapters inspect``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from manyhats.cli.adapters.files import layer_ranges
from manyhats.cli.main import app
from support.factories.adapterhub import make_adapterhub
from support.factories.adapters import make_base, make_lora
from support.factories.tiny_models import make_checkpoint, save_tokenizer, tiny_tokenizer

BASE = make_base(names=("org/tiny",))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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
    assert "kind: generate" in lines
    assert "base model: org/tiny" in lines
    assert "q_proj\tLowRank\t0-1\t2\ta [2, 32], b [32, 2]" in lines
    assert "note: nothing was compared with a base model" in result.stdout
    assert lines[-1] == "it would be accepted"


def test_refusals_are_printed_with_reason_and_key(tmp_path: Path) -> None:
    make_adapterhub(tmp_path / "a", BASE, "seq_bn", use_gating=True)
    result = run(str(tmp_path / "a"))
    assert result.exit_code == 1
    assert "would be refused: ADAPTER_UNSUPPORTED use_gating: asks for a gate" in result.stdout


def test_text_files_are_named_and_compared_with_the_bases_tokenizer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    make_lora(tmp_path / "a", make_base(names=("",)), sites=["q_proj"])
    save_tokenizer(tmp_path / "a", chat_template="{{ messages[0].content }}")
    result = run(str(tmp_path / "a"), "--model", str(tmp_path / "model"))
    assert "text files: tokenizer.json, tokenizer_config.json" in result.stdout.splitlines()
    assert "note: has a chat template of its own" in result.stdout
    other = tiny_tokenizer()
    other.add_tokens([f"<{n}>" for n in range(100)])
    save_tokenizer(tmp_path / "a", other)
    result = run(str(tmp_path / "a"), "--model", str(tmp_path / "model"))
    assert (
        "would be refused: ADAPTER_UNSUPPORTED tokenizer.json: adds '<99>' with the id 366" in result.stdout
    )


def test_a_base_is_compared_with_by_its_config_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    make_lora(tmp_path / "a", make_base(names=("",)), sites=["q_proj"])
    result = run(str(tmp_path / "a"), "--model", str(tmp_path / "model"))
    assert result.exit_code == 1
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


def _without(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def _with_config(**fields: object) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**config, **fields}))

    return change


def _with_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        save_file({**tensors, name or next(iter(tensors)): tensor}, directory / WEIGHTS)

    return change


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (_without(CONFIG), "ADAPTER_INVALID"),
    "no weights": (_without(WEIGHTS), "ADAPTER_INVALID"),
    "a pickle": (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), "ADAPTER_UNSAFE"),
    "other safetensors": (lambda d: shutil.copy(d / WEIGHTS, d / "model.safetensors"), "ADAPTER_UNSUPPORTED"),
    "no JSON": (lambda d: (d / CONFIG).write_text("{"), "ADAPTER_INVALID"),
    "a list": (lambda d: (d / CONFIG).write_text("[]"), "ADAPTER_INVALID"),
    "an unknown field": (_with_config(brand_new=True), "ADAPTER_UNSUPPORTED"),
    "an unknown method": (_with_config(peft_type="NEW"), "ADAPTER_UNSUPPORTED"),
    "a classifier without a head": (_with_config(task_type="SEQ_CLS"), "ADAPTER_INVALID"),
    "a base that is no name": (_with_config(base_model_name_or_path=7), "ADAPTER_INVALID"),
    "a rank of nothing": (_with_config(r=0), "ADAPTER_INVALID"),
    "a rank of another size": (_with_config(r=7), "ADAPTER_INVALID"),
    "weights cut short": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-1]),
        "ADAPTER_INVALID",
    ),
    "no weights in the file": (lambda d: (d / WEIGHTS).write_bytes(b""), "ADAPTER_INVALID"),
    "a tensor of no module": (_with_tensor("extra", torch.ones(1)), "ADAPTER_"),
    "a value that is not finite": (_with_tensor("", torch.full((8, 32), torch.nan)), "ADAPTER_INVALID"),
    "a link to nothing": (lambda d: _link(d / WEIGHTS, "nothing"), "ADAPTER_UNSAFE"),
    "a link to a device": (lambda d: _link(d / CONFIG, "/dev/zero"), "ADAPTER_UNSAFE"),
    "a directory in place of a file": (lambda d: _link(d / CONFIG, "."), "ADAPTER_UNSAFE"),
    "a pipe": (lambda d: (d / WEIGHTS).unlink() or os.mkfifo(d / WEIGHTS), "ADAPTER_UNSAFE"),  # type: ignore[func-returns-value]
}


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("what", REFUSED)
def test_whatever_would_be_refused_is_said_and_fails_the_command(
    tmp_path: Path, what: str, options: list[str]
) -> None:
    make_lora(tmp_path / "a", BASE, rank=8, sites=["q_proj"])
    spoil, reason = REFUSED[what]
    spoil(tmp_path / "a")
    result = run(str(tmp_path / "a"), *options)
    assert result.exit_code == 1
    if options:
        assert json.loads(result.stdout)["refusals"][0]["reason"].startswith(reason)
    else:
        assert f"would be refused: {reason}" in result.stdout
        assert "it would be accepted" not in result.stdout
