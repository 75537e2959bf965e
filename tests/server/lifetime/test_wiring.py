"""The real backend's parts get what the settings say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from manyhats.adapters.limits import AdapterLimits, Quotas
from manyhats.engine.backends.open import report_gpu
from manyhats.engine.backends.report import GpuReport
from manyhats.engine.config import EngineConfig, resolve
from manyhats.server.access.errors import ConfigError
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.config_file import make_config
from manyhats.server.lifetime.wiring import (
    open_adapter_store,
    resolve_device,
)
from support.factories.adapters import make_base


def make(**settings: Any) -> ServeConfig:
    return make_config({"model": "m", "store": Path("/s"), **settings})


def test_engine_gets_its_part_with_auto_resolved() -> None:
    assert resolve(make().engine) == EngineConfig(dtype="bfloat16", kv_cache_dtype="bfloat16")
    float32 = resolve(make(dtype="float32", max_sequences=3, max_batched_tokens=7, max_waiting=2).engine)
    assert (float32.dtype, float32.kv_cache_dtype, float32.max_num_sequences) == ("float32", "float32", 3)
    bounded = resolve(make(max_bulk_tokens=5, max_score_tokens=99).engine)
    assert (bounded.scheduler.max_bulk_tokens, bounded.max_score_tokens) == (5, 99)


H100 = GpuReport(torch="2.13", is_for_cuda=True, name="H100", capability=(9, 0), num_bytes=80 << 30)
UNUSABLE = {
    "no CUDA in torch": (
        GpuReport(torch="2.13+cpu", is_for_cuda=False),
        "torch 2.13.cpu is built without CUDA",
    ),
    "no driver": (GpuReport(torch="2.13", is_for_cuda=True), "nvidia-smi"),
    "old": (replace(H100, name="Tesla T4", capability=(7, 5)), "Tesla T4 has .* 7.5, and at least 8.0"),
}


def test_device_cuda_is_a_gpu_that_can_be_used() -> None:
    assert resolve_device("cuda", lambda: H100) == "cuda"
    assert resolve_device("cuda", lambda: replace(H100, capability=(8, 0))) == "cuda"


def test_device_auto_leaves_a_gpu_and_says_how_to_use_it() -> None:
    with capture_logs() as logs:
        assert resolve_device("auto", lambda: H100) == "cpu"
    assert "--device cuda would use H100" in logs[0]["reason"]


def test_device_cpu_looks_for_no_gpu() -> None:
    assert resolve_device("cpu", lambda: pytest.fail("looked")) == "cpu"


@pytest.mark.parametrize(("gpu", "text"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_gpu_that_cannot_be_used_is_refused_and_passed_over_by_auto_which_says_why(
    gpu: GpuReport, text: str
) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        resolve_device("cuda", lambda: gpu)
    assert caught.value.setting == "device"
    with capture_logs() as logs:
        assert resolve_device("auto", lambda: gpu) == "cpu"
    assert [log["reason"] for log in logs] == [gpu.problem]


def test_a_torch_for_cpus_is_not_asked_for_gpus() -> None:
    if torch.version.cuda is None:
        assert report_gpu() == GpuReport(torch=torch.__version__, is_for_cuda=False)


def test_the_store_gets_its_limits_and_quotas() -> None:
    assert make().adapter_limits == AdapterLimits()
    assert make().quotas == Quotas()
    limits = make(max_artifact_bytes=9, max_adapter_rank=8, max_virtual_tokens=7, max_parts=6).adapter_limits
    assert limits == AdapterLimits(max_size_bytes=9, max_rank=8, max_virtual_tokens=7, max_parts=6)
    bounds = {
        "max_tasks": 1,
        "max_versions_per_task": 2,
        "max_bytes_per_task": 3,
        "max_bytes": 4,
        "max_transfers": 5,
    }
    assert make(**bounds).quotas == Quotas(**bounds)


def test_the_store_is_opened_where_the_settings_say(tmp_path: Path) -> None:
    for store in (tmp_path / "store", str(tmp_path / "store"), f"file://{tmp_path}/store"):
        open_adapter_store(make(store=store), make_base()).close()
    assert (tmp_path / "store" / "catalogue.db").exists()


def test_settings_of_the_store_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    cases = [
        ("catalogue", {"store": "s3://bucket/store"}),
        ("catalogue", {"store": tmp_path, "catalogue": "mysql://host/name"}),
        ("adapter_url_prefixes", {"store": tmp_path, "adapter_url_prefixes": ("gopher://host/",)}),
    ]
    for setting, settings in cases:
        with pytest.raises(ConfigError) as caught:
            open_adapter_store(make(**settings), make_base())
        assert caught.value.setting == setting
