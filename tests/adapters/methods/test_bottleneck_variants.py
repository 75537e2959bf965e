"""Every variant of AdapterHub's bottleneck config, lowered, against its forward restated step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.equations import bottleneck
from manyhats.adapters.formats.adapterhub.bottleneck import parse_bottleneck_config
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.methods.bottleneck import Flow, resolve_flow
from manyhats.adapters.primitives import Bottleneck, BottleneckInput
from manyhats.adapters.sites import BaseDescription, Site
from manyhats.engine.model.describe import describe
from manyhats.engine.model.families.reading import read_family
from support.factories.adapterhub import PRESETS, adapterhub_config, adapterhub_tensors
from support.factories.adapters import make_base
from support.oracles.adapterhub import LibraryBlock
from support.oracles.primitives import bottleneck_output

BASE = make_base(num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, intermediate_size=24)
# Its layers norm the stream behind each sub-layer.
NORMED = describe(
    read_family(
        {
            "model_type": "bert",
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        }
    ),
    names=["test/tiny"],
    digest="sha256:" + "0" * 64,
)


def lowered_blocks(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseDescription = BASE
) -> list[Bottleneck]:
    artifact = AdapterArtifact(
        digest="sha256:0",
        method=AdapterMethod.BOTTLENECK,
        config=config,
        tensors=tensors,
        base_model="",
        size_bytes=0,
        num_parameters=0,
    )
    blocks = lower(artifact, base).deltas
    assert all(isinstance(block, Bottleneck) for block in blocks)
    return [block for block in blocks if isinstance(block, Bottleneck)]


FLAGS = (
    "is_parallel",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
    "adapter_residual_before_ln",
    "ln_before",
    "ln_after",
    "phm_layer",
    "phm_bias",
    "shared_W_phm",
    "shared_phm_rule",
    "factorized_phm_W",
    "factorized_phm_rule",
)
VARIANTS = st.fixed_dictionaries(
    {flag: st.booleans() for flag in FLAGS}
    | {
        "scaling": st.sampled_from((1.0, 4.0, -0.5, "learned", "channel")),
        "non_linearity": st.sampled_from(("relu", "gelu", "gelu_new", "swish", "tanh", "linear")),
        "places": st.sampled_from(((True, False), (False, True), (True, True))),
        "leave_out": st.sampled_from(([], [0], [1])),
        "reduction_factor": st.sampled_from((2, 4.0, {"0": 4, "default": 2}, {"1": 2, "0": 4})),
    }
)


@pytest.mark.parametrize("base", [BASE, NORMED], ids=["llama", "bert"])
@settings(max_examples=150, deadline=None)
@given(variant=VARIANTS, sums=st.booleans(), seed=st.integers(0, 2**31))
def test_lowered_block_is_the_librarys_forward(
    base: BaseDescription, variant: Mapping[str, Any], sums: bool, seed: int
) -> None:
    fields = dict(variant)
    attention, feed_forward = fields.pop("places")
    if fields["phm_layer"] and fields["shared_W_phm"]:
        fields["reduction_factor"] = 4  # shared factors have one size
    if sums and base is NORMED and fields["original_ln_before"]:
        fields["residual_before_ln"] = "post_add"
    fields |= {"phm_dim": 2, "phm_rank": 2, "mh_adapter": attention, "output_adapter": feed_forward}
    config = adapterhub_config(base, "seq_bn", **fields)
    tensors = adapterhub_tensors(base, config, seed=seed, scale=0.5)
    blocks = lowered_blocks(config, tensors, base)
    layers = [layer for layer in range(2) if layer not in fields["leave_out"]]
    names = [name for name, used in (("attention", attention), ("feed_forward", feed_forward)) if used]
    assert [block.site for block in blocks] == [Site(layer, name) for layer in layers for name in names]
    generator = torch.Generator().manual_seed(seed)
    m, r = torch.randn(2, 5, 16, generator=generator)
    weight, bias = torch.randn(2, 16, generator=generator)
    norm = partial(functional.layer_norm, normalized_shape=(16,), weight=weight, bias=bias)
    for block in blocks:
        own = norm if base is NORMED else None
        with torch.no_grad():
            expected = LibraryBlock(config["config"], tensors, block.site, base, own).stream_after(m, r)
        stream = r + bottleneck(block, r, m, own)
        if own is not None and not block.skips_norm:
            stream = own(stream)
        torch.testing.assert_close(stream, expected, atol=2e-4, rtol=2e-4)
        if own is None:
            torch.testing.assert_close(r + bottleneck_output(block, r, m), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("preset", "flow"),
    [
        ("seq_bn", Flow(BottleneckInput.SUM, None, 1.0, 0.0)),
        ("double_seq_bn", Flow(BottleneckInput.OUTPUT, None, 1.0, 0.0)),
        ("par_bn", Flow(BottleneckInput.RESIDUAL, None, 1.0, 0.0)),
    ],
)
def test_well_known_variants_only_add_to_the_sub_layers_output(preset: str, flow: Flow) -> None:
    config = parse_bottleneck_config(PRESETS[preset])
    assert resolve_flow(config, has_norm=False) == flow
    read = BottleneckInput.NORMED if flow.input is BottleneckInput.SUM else flow.input
    assert resolve_flow(config, has_norm=True) == replace(flow, input=read)


def test_adapter_plus_reads_the_sum_and_adds_to_the_output() -> None:
    fields = dict(PRESETS["seq_bn"]) | {
        "original_ln_after": False,
        "residual_before_ln": False,
        "scaling": "channel",
        "stochastic_depth": 0.1,
        "init_weights": "houlsby",
    }
    config = parse_bottleneck_config(fields)
    assert resolve_flow(config, has_norm=False) == Flow(BottleneckInput.SUM, None, 1.0, 0.0)
    normed = Flow(BottleneckInput.NORMED, None, 0.0, -1.0, carry_normed=1.0, skips_norm=True)
    assert resolve_flow(config, has_norm=True) == normed


@pytest.mark.parametrize("duplicate", ["adapter_down.0", None])
def test_a_norm_that_the_library_names_twice_is_one(duplicate: str | None) -> None:
    config = adapterhub_config(BASE, "double_seq_bn", ln_before=True)
    tensors = adapterhub_tensors(BASE, config)
    reference = lowered_blocks(config, tensors)[0].norm_before
    assert reference is not None
    renamed = {name.replace("adapter_norm_before", "adapter_down.0"): t for name, t in tensors.items()}
    both = tensors | renamed if duplicate is None else renamed
    norm = lowered_blocks(config, both)[0].norm_before
    assert norm is not None
    assert torch.equal(norm.weight, reference.weight)
    assert torch.equal(norm.bias, reference.bias)


@pytest.mark.parametrize("rename", [lambda name: name.removeprefix("model."), lambda name: name])
def test_names_of_a_model_without_a_head_are_the_same_tensors(rename: Callable[[str], str]) -> None:
    config = adapterhub_config(BASE, "compacter", phm_dim=2)
    tensors = {rename(name): tensor for name, tensor in adapterhub_tensors(BASE, config).items()}
    assert len(lowered_blocks(config, tensors)) == 4
