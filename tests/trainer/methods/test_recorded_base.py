"""The base that an artifact records: what PEFT loads, and what a server of the same base knows."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

from manyhats.adapters.disk.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.trainer.methods.making import make_adapter
from support.factories.tiny_models import make_checkpoint
from support.factories.trainables import ALL_CASES, PEFT_CASES, move, save


def load(spelled: str, home: Path) -> LoadedModel:
    return load_model(spelled, quantization="none", dtype=torch.float32, home=home)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base in it, whose path has a blank, and a link to it."""
    make_checkpoint(tmp_path / "my models" / "tiny")
    (tmp_path / "link").symlink_to("my models/tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
@pytest.mark.parametrize(
    ("spelled", "recorded"),
    [
        ("my models/tiny", "{here}/my models/tiny"),
        ("./my models/tiny", "{here}/my models/tiny"),
        ("my models/../my models/tiny/", "{here}/my models/tiny"),
        ("{here}/my models/tiny", "{here}/my models/tiny"),
        ("~/my models/tiny", "{here}/my models/tiny"),
        ("link", "{here}/link"),
        ("{here}/link/", "{here}/link"),
    ],
)
def test_a_local_base_is_recorded_by_a_path_that_peft_loads_and_served_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, spelled: str, recorded: str
) -> None:
    model = load(spelled.format(here=here), here / "home")
    adapter = make_adapter(PEFT_CASES["lora"], "task", model, seed=0)
    move(adapter)
    directory = save(adapter, here / "out")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == recorded.format(here=here)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    peft.AutoPeftModelForCausalLM.from_pretrained(directory)
    for served in (config["base_model_name_or_path"], str(here / "link"), str(here / "my models" / "tiny")):
        base = load(served, here / "home").description
        with open_source(str(directory), [directory]) as source:
            notes = read_adapter(source, base, AdapterLimits()).notes
        is_its_name = served == config["base_model_name_or_path"] or recorded.endswith("tiny")
        assert len(notes) == (0 if is_its_name else 1)


@pytest.mark.parametrize("case", ALL_CASES)
def test_every_method_records_the_same(here: Path, case: str) -> None:
    model = load("my models/tiny", here / "home")
    adapter = make_adapter(ALL_CASES[case], "task", model, seed=0)
    assert adapter.artifact().base_model == f"{here}/my models/tiny"


def test_a_name_that_the_config_remembers_is_not_recorded_for_what_lies_here(here: Path) -> None:
    """It is the model that the directory was made from, before whatever was done to it."""
    path = here / "my models" / "tiny" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": "org/original"}))
    model = load("my models/tiny", here / "home")
    assert model.reference == f"{here}/my models/tiny"
    assert "org/original" in model.description.names
