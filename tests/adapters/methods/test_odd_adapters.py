"""What registration accepts although it looks odd; what it refuses is in the table of hostile calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile.case import BASE, LIMITS, WEIGHTS
from manyhats.adapters.errors import AdapterTooLargeError
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_lora
from support.factories.registrations import assert_refused


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The allowed root and the adapter's directory."""
    return tmp_path / "source"


@pytest.fixture
def store(tmp_path: Path, source: Path) -> Iterator[AdapterStore]:
    source.mkdir()
    store = open_store(tmp_path / "store", BASE, [source], limits=LIMITS)
    yield store
    store.close()


def test_adapters_over_the_size_limit_are_refused_together(tmp_path: Path, source: Path) -> None:
    make_lora(source, BASE)
    total = sum(file.stat().st_size for file in source.iterdir())
    store = open_store(tmp_path / "store", BASE, [source], limits=AdapterLimits(max_size_bytes=total - 1))
    assert_refused(store, source, AdapterTooLargeError, WEIGHTS)
    store = open_store(tmp_path / "store", BASE, [source], limits=AdapterLimits(max_size_bytes=total))
    assert store.register(Registration("task", Uri(str(source)))).record.size_bytes == total


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": False},
        {
            "lora_dropout": 0.3,
            "revision": "main",
            "layers_to_transform": [0, 1],
            "layers_pattern": ["layers"],
            "megatron_core": "megatron.core",
        },
        {"new_and_unknown": None, "another": False, "third": {}, "fourth": [], "fifth": ""},
        {"corda_config": {"corda_method": "kpm"}, "qalora_group_size": 16, "ensure_weight_tying": True},
        {"target_modules": "(a+)+$", "exclude_modules": "(a+)+$"},
        # PEFT would import what this names; nothing here does.
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
    ],
)
def test_fields_that_change_nothing_are_accepted(
    store: AdapterStore, source: Path, fields: dict[str, Any]
) -> None:
    make_lora(source, BASE, rank=4, **fields)
    assert store.register(Registration("task", Uri(str(source)))).created


@pytest.mark.parametrize("name", ["org/tiny", "ORG/Tiny", "tiny"])
def test_a_base_of_a_known_name_is_accepted(store: AdapterStore, source: Path, name: str) -> None:
    make_lora(source, BASE, base_model_name_or_path=name)
    record = store.register(Registration("task", Uri(str(source)))).record
    assert (record.base_model, record.notes) == (name, ())


@pytest.mark.parametrize(
    "name", [None, "", "/models/tiny", "./tiny", "../org/tiny", "a/b/c", "C:\\models\\tiny", "my-dir"]
)
def test_an_unnamed_base_is_accepted_and_noted(store: AdapterStore, source: Path, name: str | None) -> None:
    make_lora(source, BASE, base_model_name_or_path=name)
    record = store.register(Registration("task", Uri(str(source)))).record
    assert record.base_model == (name or "")
    assert len(record.notes) == 1
