"""Pickles made into safetensors: by torch's restricted loader alone, and as the server then reads them."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    ArgumentInvalidError,
    SourceNotFoundError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.convert import convert
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from support.factories.adapterhub import PRESETS, adapterhub_config, adapterhub_tensors, make_adapterhub
from support.factories.adapters import lora_config, lora_tensors, make_base, make_lora

BASE = make_base(names=("org/tiny",))


def save_pickle(source: Path, config: dict[str, Any], content: Any, name: str) -> Path:
    source.mkdir(exist_ok=True)
    (source / "adapter_config.json").write_text(json.dumps(config))
    torch.save(content, source / name)
    return source


def save_adapterhub(source: Path, preset: str = "seq_bn", content: Any = None, **overrides: Any) -> Path:
    config = adapterhub_config(BASE, preset, **overrides)
    return save_pickle(source, config, content or adapterhub_tensors(BASE, config), "pytorch_adapter.bin")


def digest_of(tmp_path: Path, directory: Path) -> str:
    store = open_store(tmp_path / "store", BASE, [directory])
    return store.register(Registration("task", Uri(str(directory)))).record.digest


@pytest.mark.parametrize("preset", PRESETS)
def test_converted_adapterhub_adapters_are_served(tmp_path: Path, preset: str) -> None:
    save_adapterhub(tmp_path / "old", preset)
    made = convert(tmp_path / "old", tmp_path / "new")
    assert made.target == tmp_path / "new" / "adapter.safetensors"
    assert made.source.name == "pytorch_adapter.bin"
    assert (made.num_repeated, made.notes) == (0, ())
    assert made.size_bytes == made.target.stat().st_size
    expected = make_adapterhub(tmp_path / "expected", BASE, preset)
    for name, tensor in load_file(expected / "adapter.safetensors").items():
        assert torch.equal(load_file(made.target)[name], tensor)
    assert digest_of(tmp_path, tmp_path / "new").startswith("sha256:")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_converted_peft_adapters_have_the_same_tensors_and_config(tmp_path: Path, name: str) -> None:
    config = lora_config(BASE)
    save_pickle(tmp_path / "old", config, lora_tensors(BASE), name)
    made = convert(tmp_path / "old", tmp_path / "deep" / "new")
    assert made.target == tmp_path / "deep" / "new" / "adapter_model.safetensors"
    assert json.loads((made.target.parent / "adapter_config.json").read_text()) == config
    expected = make_lora(tmp_path / "expected", BASE)
    loaded, original = (
        load_file(path / "adapter_model.safetensors") for path in (made.target.parent, expected)
    )
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original.items())


def test_a_prefix_under_every_layer_is_written_once(tmp_path: Path) -> None:
    config = adapterhub_config(BASE, "prefix_flat")
    ((name, table),) = adapterhub_tensors(BASE, config).items()
    repeated = {
        name.replace("model.prefix_tuning.", f"model.layers.{layer}.self_attn.prefix_tuning.pool."): table
        for layer in range(2)
    }
    save_pickle(tmp_path / "old", config, repeated | {name: table}, "pytorch_adapter.bin")
    made = convert(tmp_path / "old", tmp_path / "new")
    assert (made.num_tensors, made.num_repeated) == (1, 2)
    assert list(load_file(made.target)) == [name]
    digest_of(tmp_path, tmp_path / "new")


def test_a_norm_under_two_names_is_written_once_and_served(tmp_path: Path) -> None:
    config = adapterhub_config(BASE, "seq_bn", ln_before=True)
    tensors = adapterhub_tensors(BASE, config)
    twice = {
        name.replace("adapter_norm_before", "adapter_down.0"): tensor for name, tensor in tensors.items()
    }
    save_pickle(tmp_path / "old", config, tensors | twice, "pytorch_adapter.bin")
    made = convert(tmp_path / "old", tmp_path / "new")
    assert made.num_repeated == 2 * BASE.num_layers
    digest_of(tmp_path, tmp_path / "new")


def test_pefts_shared_tensors_keep_each_name(tmp_path: Path) -> None:
    tensors = lora_tensors(BASE, sites=["q_proj", "o_proj"])
    a, b = (
        name for name in tensors if name.startswith("base_model.model.model.layers.0.") and "lora_A" in name
    )
    tensors[b] = tensors[a]
    save_pickle(tmp_path / "old", lora_config(BASE, sites=["q_proj", "o_proj"]), tensors, "adapter_model.bin")
    made = convert(tmp_path / "old", tmp_path / "new")
    assert made.num_repeated == 0
    loaded = load_file(made.target)
    assert loaded.keys() == tensors.keys()
    assert torch.equal(loaded[a], loaded[b])


def test_views_of_one_storage_become_tensors_of_their_own(tmp_path: Path) -> None:
    config = adapterhub_config(BASE, "lora")
    tensors = adapterhub_tensors(BASE, config)
    turned = {name: tensor.T.contiguous().T for name, tensor in tensors.items()}
    save_pickle(tmp_path / "old", config, turned, "pytorch_adapter.bin")
    loaded = load_file(convert(tmp_path / "old", tmp_path / "new").target)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_float64_becomes_float32_and_that_is_said(tmp_path: Path) -> None:
    config = adapterhub_config(BASE, "lora")
    doubles = {name: tensor.double() for name, tensor in adapterhub_tensors(BASE, config).items()}
    save_pickle(tmp_path / "old", config, doubles, "pytorch_adapter.bin")
    made = convert(tmp_path / "old", tmp_path / "new")
    assert made.notes == ("8 float64 tensors were converted to float32",)
    assert {tensor.dtype for tensor in load_file(made.target).values()} == {torch.float32}


def test_what_people_wrote_beside_it_comes_along(tmp_path: Path) -> None:
    source = save_adapterhub(tmp_path / "old")
    for name in ("README.md", "chat_template.jinja", "optimizer.pt"):
        (source / name).write_text(name)
    convert(source, tmp_path / "new")
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"README.md", "chat_template.jinja", "adapter_config.json", "adapter.safetensors"}
    assert (tmp_path / "new" / "README.md").read_text() == "README.md"


# What is refused


class _Harmful:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, is_archive: bool) -> None:
    harm = _Harmful(tmp_path / "harm")
    source = save_adapterhub(tmp_path / "old", content={"x": harm})
    if not is_archive:
        (source / "pytorch_adapter.bin").write_bytes(pickle.dumps({"x": harm}))
    with pytest.raises(AdapterUnsafeError, match="restricted loader"):
        convert(source, tmp_path / "new")
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([torch.ones(2)], AdapterInvalidError),
        ({"x": 3}, AdapterInvalidError),
        ({3: torch.ones(2)}, AdapterInvalidError),
        ({"x": {"y": torch.ones(2)}}, AdapterInvalidError),
        ({"x": torch.ones(2, dtype=torch.int64)}, AdapterUnsupportedError),
        ({"x": torch.eye(2).to_sparse()}, AdapterUnsupportedError),
        ({"x": torch.ones(1).expand(10**6, 10**6)}, AdapterTooLargeError),
    ],
)
def test_content_that_is_no_table_of_dense_floats_is_refused(
    tmp_path: Path, content: Any, error: type[AdapterError]
) -> None:
    source = save_adapterhub(tmp_path / "old", content=content)
    with pytest.raises(error):
        convert(source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>", b"junk bytes here", b"PK\x03\x04" + bytes(40)])
def test_bytes_that_torch_did_not_write_are_refused(tmp_path: Path, content: bytes) -> None:
    source = save_adapterhub(tmp_path / "old")
    (source / "pytorch_adapter.bin").write_bytes(content)
    with pytest.raises(AdapterInvalidError, match=r"pytorch_adapter\.bin: is not a pickle"):
        convert(source, tmp_path / "new")


def test_limits_hold(tmp_path: Path) -> None:
    source = save_adapterhub(tmp_path / "old")
    with pytest.raises(AdapterTooLargeError, match=r"pytorch_adapter\.bin"):
        convert(source, tmp_path / "new", AdapterLimits(max_size_bytes=1000))
    with pytest.raises(AdapterTooLargeError, match="8 tensors"):
        convert(source, tmp_path / "new", AdapterLimits(max_num_tensors=7))


def test_a_source_without_a_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        convert(tmp_path / "nothing", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterInvalidError, match=r"adapter_config\.json: is missing"):
        convert(tmp_path / "empty", tmp_path / "new")
    with pytest.raises(AdapterInvalidError, match="nothing to convert"):
        convert(make_adapterhub(tmp_path / "done", BASE), tmp_path / "new")
    source = save_adapterhub(tmp_path / "old")
    (source / "pytorch_adapter.bin").unlink()
    with pytest.raises(AdapterInvalidError, match=r"pytorch_adapter\.bin: is missing"):
        convert(source, tmp_path / "new")


def test_two_pickles_or_a_head_are_refused(tmp_path: Path) -> None:
    source = save_pickle(tmp_path / "old", lora_config(BASE), lora_tensors(BASE), "adapter_model.bin")
    torch.save({}, source / "adapter_model.pt")
    with pytest.raises(AdapterUnsupportedError, match=r"adapter_model\.pt"):
        convert(source, tmp_path / "new")
    headed = save_adapterhub(tmp_path / "headed")
    (headed / "pytorch_model_head.bin").write_bytes(b"")
    with pytest.raises(AdapterUnsupportedError, match="with_head"):
        convert(headed, tmp_path / "new")


def test_a_target_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    source = save_adapterhub(tmp_path / "old")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "kept").write_text("kept")
    with pytest.raises(ArgumentInvalidError, match="already exists"):
        convert(source, tmp_path / "new")
    with pytest.raises(ArgumentInvalidError, match="already exists"):
        convert(source, tmp_path / "new" / "kept")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]
    (tmp_path / "new" / "kept").unlink()
    assert convert(source, tmp_path / "new").num_tensors == 8
