"""What AdapterHub has for encoders alone, in the store: how it is lowered, and every refusal with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.primitives import PromptEmbeddings
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapterhub import (
    ENCODER_PRESETS,
    NAME,
    adapterhub_config,
    adapterhub_tensors,
    make_adapterhub,
    write_adapterhub,
)
from support.factories.adapters import make_base
from support.factories.registrations import assert_refused
from support.factories.tiny_encoders import make_encoder_base

BASE = make_encoder_base()
DECODER = make_base(names=("org/tiny",))
METHODS = {"prompt": AdapterMethod.PROMPT_TUNING, "prompt_after_bos": AdapterMethod.PROMPT_TUNING}


def make_store(tmp_path: Path, base: BaseDescription = BASE, **limits: Any) -> AdapterStore:
    return open_store(tmp_path / "store", base, [tmp_path], limits=AdapterLimits(**limits))


@pytest.mark.parametrize("preset", ENCODER_PRESETS)
def test_every_preset_is_served_on_an_encoder_only(tmp_path: Path, preset: str) -> None:
    make_adapterhub(tmp_path / "source", BASE, preset)
    record = make_store(tmp_path).register(Registration("task", Uri(str(tmp_path / "source")))).record
    assert record.method is METHODS[preset]


@pytest.mark.parametrize("preset", ENCODER_PRESETS)
def test_none_is_served_on_a_decoder(tmp_path: Path, preset: str) -> None:
    make_adapterhub(tmp_path / "source", DECODER, preset)
    assert_refused(
        make_store(tmp_path, DECODER), tmp_path / "source", AdapterUnsupportedError, "architecture"
    )


@pytest.mark.parametrize("preset", ["prompt", "prompt_after_bos"])
def test_a_prompt_is_as_wide_as_the_embedding(tmp_path: Path, preset: str) -> None:
    base = make_encoder_base("electra", embedding_size=8)
    make_adapterhub(tmp_path / "source", base, preset)
    store = make_store(tmp_path, base)
    record = store.register(Registration("task", Uri(str(tmp_path / "source")))).record
    prefix = store.lower(record).prefix
    assert isinstance(prefix, PromptEmbeddings)
    assert prefix.embeddings.shape == (5, 8)
    assert (prefix.are_normed, prefix.are_read) == (True, preset == "prompt")
    assert prefix.position_offset == -5


FIELDS: list[tuple[str, dict[str, Any], type[AdapterError], str]] = [
    ("prompt", {"combine": "suffix"}, AdapterUnsupportedError, "combine"),
    ("prompt", {"prompt_length": 0}, AdapterInvalidError, "prompt_length"),
    ("prompt", {"prompt_length": 9}, AdapterTooLargeError, "prompt_length"),
    ("prompt", {"a_new_field": 1}, AdapterUnsupportedError, "a_new_field"),
]


@pytest.mark.parametrize(("preset", "fields", "error", "key"), FIELDS)
def test_fields_that_cannot_be_served_are_refused_by_name(
    tmp_path: Path, preset: str, fields: dict[str, Any], error: type[AdapterError], key: str
) -> None:
    config = adapterhub_config(BASE, preset)
    tensors = adapterhub_tensors(BASE, config)
    config["config"] |= fields
    write_adapterhub(tmp_path / "source", config, tensors)
    assert_refused(make_store(tmp_path, max_virtual_tokens=8), tmp_path / "source", error, key)


PROMPT = f"bert.prompt_tuning.prompt_tunings.{NAME}.prompt_embedding.weight"


@pytest.mark.parametrize(
    ("preset", "changes", "name"),
    [
        ("prompt", {PROMPT: None}, PROMPT),
        ("prompt", {PROMPT: (5, 17)}, PROMPT),
        ("prompt", {"bert.more.weight": (3,)}, "bert.more.weight"),
    ],
)
def test_tensors_that_do_not_match_are_refused_by_name(
    tmp_path: Path, preset: str, changes: dict[str, tuple[int, ...] | None], name: str
) -> None:
    config = adapterhub_config(BASE, preset)
    tensors = adapterhub_tensors(BASE, config)
    for tensor, shape in changes.items():
        tensors[tensor] = torch.ones(shape or ())
        if shape is None:
            del tensors[tensor]
    write_adapterhub(tmp_path / "source", config, tensors or {"bert.more.weight": torch.ones(1)})
    assert_refused(
        make_store(tmp_path),
        tmp_path / "source",
        AdapterInvalidError,
        name if tensors else "bert.more.weight",
    )
