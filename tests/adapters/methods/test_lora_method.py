from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.disk.files import open_source
from manyhats.adapters.equations import low_rank
from manyhats.adapters.errors import AdapterError, AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.formats.peft.lora_tensors import lora_scale
from manyhats.adapters.formats.peft.module_patterns import compile_patterns
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import has_effect, lower
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import Site
from support.factories.adapters import (
    ALL_LINEARS,
    lora_config,
    lora_tensors,
    make_base,
    make_lora,
    module_path,
)

BASE = make_base()


def artifact_of(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AdapterArtifact:
    return AdapterArtifact(
        digest="sha256:" + "1" * 64,
        method=AdapterMethod.LORA,
        config=config,
        tensors=tensors,
        base_model="test/tiny",
        size_bytes=1,
        num_parameters=1,
    )


def lower_directory(directory: Path) -> LoweredAdapter:
    with open_source(str(directory), [directory]) as source:
        return lower(read_adapter(source, BASE, AdapterLimits()).artifact, BASE)


def test_the_delta_is_the_scaled_product() -> None:
    x, a, b = torch.randn(5, 3), torch.randn(2, 3), torch.randn(4, 2)
    assert torch.allclose(low_rank(x, a, b, 0.5), 0.5 * x @ (b @ a).T, atol=1e-6)


def test_the_scale_is_alpha_over_rank_or_over_its_root() -> None:
    assert lora_scale(16, 4) == 4
    assert lora_scale(16, 4, is_rank_stabilised=True) == 8


@given(
    ranks=st.fixed_dictionaries({site: st.integers(1, 9) for site in ALL_LINEARS}),
    sites=st.sets(st.sampled_from(ALL_LINEARS), min_size=1),
    layers=st.sampled_from([None, (0,), (1,)]),
    alpha=st.integers(1, 64) | st.floats(0.1, 64),
    use_rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_lowering_keeps_every_matrix_at_its_site(
    ranks: dict[str, int],
    sites: set[str],
    layers: Collection[int] | None,
    alpha: float,
    use_rslora: bool,
    dtype: torch.dtype,
) -> None:
    tensors = lora_tensors(BASE, rank=ranks, sites=sites, layers=layers, dtype=dtype)
    config = lora_config(BASE, rank=ranks, alpha=alpha, sites=sites, use_rslora=use_rslora)
    lowered = lower(artifact_of(config, tensors), BASE)
    used_layers = (0, 1) if layers is None else layers
    assert [delta.site for delta in lowered.deltas] == sorted(Site(n, s) for n in used_layers for s in sites)
    for delta in lowered.deltas:
        name = f"base_model.model.{module_path(delta.site.layer, delta.site.name)}"
        rank = ranks[delta.site.name]
        assert torch.equal(delta.a, tensors[f"{name}.lora_A.weight"])
        assert torch.equal(delta.b, tensors[f"{name}.lora_B.weight"])
        assert delta.rank == rank
        assert delta.scale == pytest.approx(alpha / (rank**0.5 if use_rslora else rank))


def test_the_first_alpha_pattern_that_matches_wins() -> None:
    config = lora_config(
        BASE,
        rank=4,
        alpha=8,
        alpha_pattern={
            r"^model\.layers\.0\.self_attn\.q_proj": 40,
            "q_proj": 20,
            r"layers\.1\.mlp\.(up|gate)_proj|[k]_proj": 12,
        },
    )
    scales = {
        delta.site: delta.scale
        for delta in lower(artifact_of(config, lora_tensors(BASE, rank=4)), BASE).deltas
    }
    assert scales[Site(0, "q_proj")] == 10
    assert scales[Site(1, "q_proj")] == 5
    assert scales[Site(1, "up_proj")] == scales[Site(0, "k_proj")] == 3
    assert scales[Site(0, "up_proj")] == scales[Site(0, "v_proj")] == 2


_PLAIN_KEYS = st.from_regex(r"\A\^?[a-z0-9_.]{1,12}\Z") | st.sampled_from(
    [
        "q_proj",
        "proj",
        "self_attn.q_proj",
        r"layers\.1\.mlp\.up_proj",
        "layers.1.mlp.up_proj$",
        "q_proj|up_proj",
        "..proj",
        r"(q|k|up)_proj",
        r"layers\.[01]\..*_proj",
        ".*",
        "a b",
        "|q",
    ]
)


@given(st.dictionaries(_PLAIN_KEYS, st.integers(1, 9), max_size=4))
def test_patterns_match_as_peft_matches_them(pattern: dict[str, int]) -> None:
    compiled = compile_patterns("rank_pattern", pattern)
    for module in BASE.modules:
        key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)
        assert compiled.value_for(module, 0) == (0 if key is None else pattern[key])


def test_an_adapter_changes_something_unless_all_is_zero() -> None:
    config, tensors = lora_config(BASE, rank=2), lora_tensors(BASE, rank=2)
    assert has_effect(lower(artifact_of(config, tensors), BASE))
    assert not has_effect(lower(artifact_of(config | {"lora_alpha": 0}, tensors), BASE))
    for part in (".lora_A.", ".lora_B."):
        zeroed = {name: torch.zeros_like(t) if part in name else t for name, t in tensors.items()}
        assert not has_effect(lower(artifact_of(config, zeroed), BASE))


def test_lowering_refuses_a_method_that_nothing_knows() -> None:
    artifact = AdapterArtifact(
        digest="",
        method=AdapterMethod.COMPOSED,
        config={},
        tensors={},
        base_model="",
        size_bytes=0,
        num_parameters=0,
    )
    with pytest.raises(AdapterUnsupportedError, match="composed"):
        lower(artifact, BASE)


def test_fields_that_are_left_out_have_peft_s_defaults(tmp_path: Path) -> None:
    make_lora(tmp_path, BASE, rank=8)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert {delta.scale for delta in lower_directory(tmp_path).deltas} == {1.0}


_VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.lists(st.integers(), max_size=2)
)
_FIELDS = st.sampled_from(
    ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias", "x"]
)


@given(
    st.dictionaries(_FIELDS, _VALUES | st.dictionaries(st.text(max_size=3), _VALUES, max_size=2), max_size=4)
)
def test_arbitrary_config_values_raise_nothing_but_adapter_errors(overrides: dict[str, Any]) -> None:
    config = lora_config(BASE, rank=2, sites=["q_proj"]) | overrides
    try:
        lowered = lower(artifact_of(config, lora_tensors(BASE, rank=2, sites=["q_proj"])), BASE)
    except AdapterError:
        return
    assert all(torch.isfinite(torch.tensor(delta.scale)) for delta in lowered.deltas)


def test_ranks_that_contradict_the_config_are_refused() -> None:
    tensors = lora_tensors(BASE, rank=4, sites=["q_proj"])
    with pytest.raises(AdapterInvalidError, match="has rank 4; the config says 8"):
        lower(artifact_of(lora_config(BASE, rank=8, sites=["q_proj"]), tensors), BASE)
