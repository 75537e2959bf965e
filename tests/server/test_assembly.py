"""The real backend's parts get what the settings say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manyhats.engine.config import EngineConfig
from manyhats.server.assembly import engine_config, resolve_device
from manyhats.server.config import ServeConfig
from manyhats.server.errors import ConfigError


def make(**settings: Any) -> ServeConfig:
    return ServeConfig(**{"model": "m", "store": Path("/s"), **settings})


def test_engine_gets_its_part_with_auto_resolved() -> None:
    assert engine_config(make()) == EngineConfig(dtype="bfloat16", kv_cache_dtype="bfloat16")
    float32 = engine_config(make(dtype="float32", max_sequences=3, max_batched_tokens=7, max_waiting=2))
    assert (float32.dtype, float32.kv_cache_dtype, float32.max_num_sequences) == ("float32", "float32", 3)


def test_device_auto_is_what_there_are_kernels_for() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError) as caught:
        resolve_device("cuda")
    assert caught.value.setting == "device"
