"""What the doctor says of the model's files, memory and compiled kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from manyhats.engine.checkpoints.inspection import inspect_model
from manyhats.engine.checkpoints.loader import load_model
from manyhats.engine.checkpoints.size import weight_bytes
from manyhats.engine.errors import ModelError
from manyhats.engine.home import default_home
from manyhats.server.doctor.model import (
    inspect_served_model,
    look_at_kernel_cache,
    look_at_memory,
    look_at_model,
)
from manyhats.server.lifetime.cgroup import Cgroup
from support.factories.default_model import DEFAULT_MODEL
from support.factories.tiny_models import make_checkpoint
from support.harnesses.doctor import Make, only

GIB = 2**30


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)


def memory(directory: Path, total: int, available: int) -> Cgroup:
    text = f"MemTotal: {total // 1024} kB\nMemAvailable: {available // 1024} kB\n"
    (directory / "meminfo").write_text(text)
    return Cgroup(directory / "nowhere", directory / "nowhere", directory / "meminfo")


def test_a_model_that_is_not_here_is_a_warning_and_is_not_fetched(make: Make, tmp_path: Path) -> None:
    config = make(model=DEFAULT_MODEL)
    finding = only(look_at_model(inspect_served_model(config), config))
    assert finding.condition.value == "warning"
    assert f"manyhats model fetch {DEFAULT_MODEL}" in finding.advice
    assert not (tmp_path / "home").exists()
    assert inspect_served_model(make(model="org/not-in-the-hubs-cache")) is None
    with pytest.raises(ModelError, match="not a directory"):
        inspect_served_model(make(model="no model"))


def test_a_whole_model_is_ok_and_what_a_start_would_still_do_is_said(make: Make, checkpoint: Path) -> None:
    config = make(model=str(checkpoint), quantization="nf4")
    finding = only(look_at_model(inspect_served_model(config), config))
    assert (finding.condition.value, "quantizes it" in finding.text) == ("ok", True)
    load_model(str(checkpoint), quantization="nf4", dtype=torch.float32)
    finding = only(look_at_model(inspect_served_model(config), config))
    assert finding.text.endswith("whole; quantization nf4")


def test_damage_is_found(make: Make, checkpoint: Path) -> None:
    load_model(str(checkpoint), quantization="nf4", dtype=torch.float32)
    (weights,) = (default_home() / "nf4").rglob("model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match="digest"):
        inspect_served_model(make(model=str(checkpoint), quantization="nf4"))
    own = checkpoint / "model.safetensors"
    own.write_bytes(own.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        inspect_served_model(make(model=str(checkpoint), quantization="none"))


def test_a_known_model_is_compared_with_its_digests(make: Make, checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "home/models" / DEFAULT_MODEL
    directory.parent.mkdir(parents=True)
    checkpoint.rename(directory)
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": "0" * 64} for path in directory.iterdir()
    }
    (directory / "manyhats.json").write_text(json.dumps({"files": files}))
    with pytest.raises(ModelError, match=f"manyhats model fetch {DEFAULT_MODEL}"):
        inspect_served_model(make(model=DEFAULT_MODEL))


@pytest.mark.parametrize(
    ("total", "available", "condition"),
    [
        (16 * GIB, 8 * GIB, "ok"),
        (16 * GIB, 2 * GIB, "warning"),
        (3 * GIB, 3 * GIB, "warning"),
        (1 * GIB, 1 * GIB, "failure"),
    ],
)
def test_memory_is_compared_with_what_the_server_will_take(
    make: Make, checkpoint: Path, tmp_path: Path, total: int, available: int, condition: str
) -> None:
    # So many that the cache is not bounded by what they can use.
    config = make(model=str(checkpoint), max_sequences=200_000, max_batched_tokens=200_000)
    machine = memory(tmp_path, total, available)
    finding = only(look_at_memory(inspect_served_model(config), config, machine))
    assert finding.condition.value == condition
    assert "KV cache 1.0 GiB" in finding.text
    assert "adapters up to 2.0 GiB" in finding.text


def test_memory_without_a_model_or_a_number(make: Make, tmp_path: Path) -> None:
    assert only(look_at_memory(None, make(), memory(tmp_path, GIB, GIB))).condition.value == "ok"
    nowhere = Path("/nowhere")
    assert only(look_at_memory(None, make(), Cgroup(nowhere, nowhere, nowhere))).condition.value == "ok"


def test_predicted_weights_are_those_that_are_loaded(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", dtype=torch.bfloat16, num_layers=4, hidden_size=128)
    found = inspect_model(str(checkpoint), quantization="none", max_context_length=None, home=tmp_path)
    assert found is not None
    model = load_model(str(checkpoint), quantization="none", dtype=torch.bfloat16, home=tmp_path)
    linears = [each.matrix for block in model.weights.sets for each in block.linears.values()]
    tables = [model.weights.embedding]
    if model.weights.head is not None and model.weights.head.matrix is not model.weights.embedding:
        tables.append(model.weights.head.matrix)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*linears, *tables))
    assert weight_bytes(found.family, is_nf4=False) == pytest.approx(held, rel=0.02)


def test_a_cache_of_kernels_that_is_empty_or_filled(tmp_path: Path) -> None:
    directory = tmp_path / "kernels"
    finding = only(look_at_kernel_cache(directory))
    assert (finding.condition.value, "first start" in finding.text) == ("ok", True)
    assert not directory.exists()
    (directory / "simd").mkdir(parents=True)
    (directory / "simd" / "a.py311.nbi").touch()
    assert only(look_at_kernel_cache(directory)).text == f"in {directory}"


@pytest.mark.usefixtures("as_nobody")
def test_a_cache_of_kernels_that_cannot_be_written_fails_or_warns(tmp_path: Path) -> None:
    finding = only(look_at_kernel_cache(Path("/proc/1/kernels")))
    assert finding.condition.value == "failure"
    assert "NUMBA_CACHE_DIR" in finding.advice
    file = Path("/proc/version")
    assert "not a directory" in only(look_at_kernel_cache(file / "kernels")).text


def test_kernels_that_can_be_read_but_not_added_to_are_a_warning(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.nbi").touch()
    (tmp_path / "kernels").chmod(0o555)
    request.getfixturevalue("as_nobody")
    assert only(look_at_kernel_cache(tmp_path / "kernels")).condition.value == "warning"
