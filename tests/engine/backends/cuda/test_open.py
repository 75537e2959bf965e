"""Which code runs on a GPU, and what is said where it cannot."""

from __future__ import annotations

import support.gpu.interpreter  # noqa: F401  isort: skip

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from manyhats.engine.backends.cuda import backend as kernels
from manyhats.engine.backends.cuda.backend import CudaBackend
from manyhats.engine.backends.cuda.failures import launching
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.memory import largest_plan, run_largest
from manyhats.engine.backends.open import open_backend
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.config import EngineConfig, limits_of
from manyhats.engine.errors import EngineDeadError, ModelError
from support.factories.tiny_encoders import make_encoder
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import load_tiny

LIMITS = Limits(max_rows=18, max_sequences=3, adapter_bytes=1 << 16, memory_fraction=0.9)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_found", lambda device: kernels._CPU)


@pytest.mark.usefixtures("a_gpu")
def test_kernels_run_where_rows_shall_keep_their_bits_and_libraries_where_not() -> None:
    strict = open_backend("cuda", dtype="bfloat16", limits=LIMITS)
    fast = open_backend("cuda", dtype="bfloat16", limits=LIMITS, keeps_bits=False)
    exact = open_backend("cuda", dtype="float32", limits=LIMITS)
    assert (strict.name, fast.name, exact.name) == ("cuda", "torch-cuda", "torch-cuda")
    assert isinstance(strict, CudaBackend)
    assert isinstance(fast, TorchBackend)


def test_without_triton_the_error_says_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "manyhats.engine.backends.cuda.backend")
    for name in [name for name in sys.modules if name.startswith("manyhats.engine.backends.cuda.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ModelError, match=r"install triton, or give --invariance fast"):
        open_backend("cuda", dtype="bfloat16", limits=LIMITS)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_other_caches_are_refused_with_what_to_do(dtype: str, tmp_path: Path) -> None:
    architecture = load_tiny(make_checkpoint(tmp_path / "tiny")).architecture
    with pytest.raises(
        ModelError, match=f"not {dtype}; give --kv-cache-dtype bfloat16, or --invariance fast"
    ):
        CudaBackend("cpu", LIMITS).new_cache(architecture, 16, dtype, 1 << 20)


def test_the_largest_step_runs_and_has_all_results(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "tiny"))
    backend = CudaBackend("cpu", LIMITS)
    prepared = backend.prepare(model.architecture, model.weights)
    slots = backend.new_adapters(model.architecture, 1, "bfloat16")
    found = run_largest(backend, prepared, slots, 16, "bfloat16", LIMITS)
    assert (len(found.tokens), len(found.targets)) == (3, 18)
    assert not found.bad_rows
    with pytest.raises(ModelError, match="the KV cache needs a size"):
        backend.new_cache(model.architecture, 16, "bfloat16", None)


def test_an_encoders_longest_text_has_room_and_a_larger_step_is_refused(tmp_path: Path) -> None:
    encoder = load_tiny(make_encoder(tmp_path / "encoder"))
    config = EngineConfig(max_num_batched_tokens=2, max_num_sequences=2)
    limits = limits_of(config, encoder.architecture)
    assert limits.max_rows == encoder.architecture.max_context_length
    assert limits.max_choices == config.scheduler.max_draft_rows
    prepared = CudaBackend("cpu", LIMITS).prepare(encoder.architecture, encoder.weights)
    plan = largest_plan(replace(LIMITS, max_rows=19), 16, encoder.architecture)
    cache = CudaBackend("cpu", LIMITS).new_cache(encoder.architecture, 16, "bfloat16", 1 << 16)
    slots = CudaBackend("cpu", LIMITS).new_adapters(encoder.architecture, 1, "bfloat16")
    with pytest.raises(ValueError, match="19 rows, and memory for 18"):
        prepared.forward(plan, cache, slots)


@pytest.mark.parametrize(
    ("message", "expected"),
    [("CUDA error: out of memory", torch.AcceleratorError), ("an illegal memory access", EngineDeadError)],
)
def test_a_devices_error_ends_the_engine_unless_memory_ran_out(
    message: str, expected: type[Exception]
) -> None:
    waited = []

    class Event:
        def record(self) -> None:
            waited.append("recorded")

        def synchronize(self) -> None:
            waited.append("waited")

    class Runtime:
        def new_event(self) -> Event:
            return Event()

    with pytest.raises(expected), launching(cast(Any, Runtime())):
        raise torch.AcceleratorError(message)
    assert waited == ["recorded", "waited"]
