"""What prefix tuning lowers to, and what of it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.disk.files import open_source
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
    BaseMismatchError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.lowering.reader import ReadAdapter, read_adapter
from manyhats.adapters.method import Candidate
from manyhats.adapters.methods.prefix_tuning import PrefixTuningMethod, split_prefix
from manyhats.adapters.primitives import KVPrefix
from support.factories.adapters import write_adapter
from support.factories.prefixes import artifact_of, make_prefix, prefix_config, prefix_tensors, tiny_base

BASE = tiny_base()


def read_directory(directory: Path, limits: AdapterLimits | None = None) -> ReadAdapter:
    with open_source(str(directory), [directory]) as source:
        return read_adapter(source, BASE, limits or AdapterLimits())


@settings(deadline=None)
@given(
    num_virtual=st.integers(1, 9),
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 8),
)
def test_layer_l_has_its_keys_at_2l_and_its_values_at_2l_plus_1(
    num_virtual: int, num_layers: int, num_kv_heads: int, head_dim: int
) -> None:
    flat = torch.randn(num_virtual, 2 * num_layers * num_kv_heads * head_dim)
    keys, values = split_prefix(flat, num_layers, num_kv_heads)
    assert keys.shape == values.shape == (num_layers, num_virtual, num_kv_heads, head_dim)
    stored = flat.view(num_virtual, 2 * num_layers, num_kv_heads, head_dim)
    for layer in range(num_layers):
        assert torch.equal(keys[layer], stored[:, 2 * layer])
        assert torch.equal(values[layer], stored[:, 2 * layer + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_lowers_to_a_prefix_alone_in_its_stored_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    make_prefix(tmp_path, BASE, num_virtual_tokens=7, dtype=dtype)
    read = read_directory(tmp_path)
    lowered = lower(read.artifact, BASE)
    assert read.artifact.method is AdapterMethod.PREFIX_TUNING
    assert lowered.digest == read.artifact.digest
    assert lowered.deltas == ()
    assert isinstance(lowered.prefix, KVPrefix)
    assert lowered.prefix.num_virtual_tokens == 7
    assert lowered.prefix.position_offset == 0
    assert lowered.prefix.keys.dtype is lowered.prefix.values.dtype is dtype
    assert lowered.prefix.keys.is_contiguous()


def test_numbers_that_the_config_leaves_out_are_the_base_s() -> None:
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}
    lowered = lower(artifact_of(config, prefix_tensors(BASE)), BASE)
    full = lower(artifact_of(prefix_config(BASE), prefix_tensors(BASE)), BASE)
    assert isinstance(lowered.prefix, KVPrefix)
    assert isinstance(full.prefix, KVPrefix)
    assert torch.equal(lowered.prefix.keys, full.prefix.keys)


@pytest.mark.parametrize(
    ("fields", "error", "subject"),
    [
        ({"num_virtual_tokens": 5}, AdapterInvalidError, "prompt_embeddings"),
        ({"num_virtual_tokens": None}, AdapterInvalidError, "num_virtual_tokens"),
        ({"num_virtual_tokens": 0}, AdapterInvalidError, "num_virtual_tokens"),
        ({"num_virtual_tokens": "4"}, AdapterInvalidError, "num_virtual_tokens"),
        ({"num_virtual_tokens": True}, AdapterInvalidError, "num_virtual_tokens"),
        ({"token_dim": 32}, AdapterInvalidError, "token_dim"),
        ({"token_dim": -1}, AdapterInvalidError, "token_dim"),
        ({"num_attention_heads": 4}, AdapterInvalidError, "num_attention_heads"),
        ({"num_layers": 1}, AdapterInvalidError, "num_layers"),
        ({"num_transformer_submodules": 2}, AdapterUnsupportedError, "num_transformer_submodules"),
        ({"modules_to_save": ["lm_head"]}, AdapterUnsupportedError, "modules_to_save"),
        ({"num_frozen_tokens": 1}, AdapterUnsupportedError, "num_frozen_tokens"),
        ({"rotate_keys": True}, AdapterUnsupportedError, "rotate_keys"),
        ({"task_type": "SEQ_2_SEQ_LM"}, AdapterUnsupportedError, "task_type"),
        ({"task_type": "SEQ_CLS"}, AdapterInvalidError, "task_type"),
    ],
)
def test_a_config_that_is_not_the_tensor_s_or_the_base_s_is_refused(
    fields: dict[str, Any], error: type[AdapterError], subject: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, prefix_config(BASE) | fields, prefix_tensors(BASE))
    with pytest.raises(error) as caught:
        read_directory(tmp_path)
    assert caught.value.subject == subject


def test_another_base_s_prefix_is_told_from_a_broken_one() -> None:
    for other in (tiny_base(num_layers=3), tiny_base(num_kv_heads=4), tiny_base(head_dim=16)):
        for base_model, error in (("test/tiny", AdapterInvalidError), ("", BaseMismatchError)):
            for config in (prefix_config(other), {"num_virtual_tokens": 4}):
                shapes = {"prompt_embeddings": tuple(prefix_tensors(other)["prompt_embeddings"].shape)}
                with pytest.raises(error):
                    PrefixTuningMethod().check(Candidate(config, shapes, base_model), BASE, AdapterLimits())


def test_heads_of_the_same_width_but_another_number_are_another_base_s(tmp_path: Path) -> None:
    make_prefix(tmp_path, tiny_base(num_kv_heads=1, head_dim=16))
    with pytest.raises(AdapterInvalidError, match="num_attention_heads: is 1; the base has 2"):
        read_directory(tmp_path)


def test_the_number_of_virtual_tokens_has_a_limit(tmp_path: Path) -> None:
    make_prefix(tmp_path, BASE, num_virtual_tokens=9)
    read_directory(tmp_path, AdapterLimits(max_virtual_tokens=9))
    with pytest.raises(AdapterTooLargeError, match="num_virtual_tokens: is 9; the limit is 8"):
        read_directory(tmp_path, AdapterLimits(max_virtual_tokens=8))


def test_tensors_are_all_there_and_all_used() -> None:
    config, tensors = prefix_config(BASE), prefix_tensors(BASE)
    with pytest.raises(AdapterInvalidError, match="prompt_embeddings: is missing"):
        lower(artifact_of(config, {}), BASE)
    extra = tensors | {"base_model.model.lm_head.weight": torch.ones(64, 32)}
    with pytest.raises(AdapterInvalidError, match="lm_head"):
        lower(artifact_of(config, extra), BASE)
    flat = {"prompt_embeddings": tensors["prompt_embeddings"].reshape(-1)}
    with pytest.raises(AdapterInvalidError, match="has 1 dimensions; expected 2"):
        lower(artifact_of(config, flat), BASE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    make_prefix(tmp_path, BASE, scale=value)
    with pytest.raises(AdapterInvalidError, match="prompt_embeddings: has values that are not finite"):
        read_directory(tmp_path)


def test_a_base_whose_heads_are_unknown_takes_no_prefix() -> None:
    with pytest.raises(AdapterUnsupportedError, match="heads are not known"):
        lower(artifact_of(prefix_config(BASE), prefix_tensors(BASE)), replace(BASE, num_kv_heads=0))


@pytest.mark.parametrize(
    ("peft_type", "reason"),
    [
        ("ADAPTION_PROMPT", "attend to their tokens separately"),
        ("CPT", "context-aware"),
        ("POLY", "'POLY' adapters are not served"),
    ],
)
def test_other_methods_of_virtual_tokens_are_refused_by_name(
    peft_type: str, reason: str, tmp_path: Path
) -> None:
    make_prefix(tmp_path, BASE, peft_type=peft_type)
    with pytest.raises(AdapterUnsupportedError, match=reason) as caught:
        read_directory(tmp_path)
    assert caught.value.subject == "peft_type"


_FIELDS = st.sampled_from(
    (
        "num_virtual_tokens",
        "token_dim",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "prefix_projection",
        "x",
    )
)
_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.none())


@settings(deadline=None)
@given(st.dictionaries(_FIELDS, _VALUES, max_size=4))
def test_arbitrary_config_values_raise_nothing_but_adapter_errors(fields: dict[str, Any]) -> None:
    config = prefix_config(BASE) | fields
    try:
        lowered = lower(artifact_of(config, prefix_tensors(BASE)), BASE)
    except AdapterError:
        return
    assert isinstance(lowered.prefix, KVPrefix)
    assert lowered.prefix.num_virtual_tokens == 4
