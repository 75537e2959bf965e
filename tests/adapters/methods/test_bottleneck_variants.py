"""Every variant of AdapterHub's bottleneck config, lowered, against its forward restated step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.equations import bottleneck
from manyhats.adapters.formats.adapterhub.bottleneck import parse_bottleneck_config
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.methods.bottleneck import Flow, resolve_flow
from manyhats.adapters.primitives import Bottleneck, BottleneckInput
from manyhats.adapters.sites import Site
from support.factories.adapterhub import NAME, PRESETS, adapterhub_config, adapterhub_tensors
from support.factories.adapters import make_base
from support.oracles.primitives import bottleneck_output

BASE = make_base(num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, intermediate_size=24)
MODULES = {"attention": "attention_adapters", "feed_forward": "output_adapters"}


def lowered_blocks(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Bottleneck]:
    artifact = AdapterArtifact(
        digest="sha256:0",
        method=AdapterMethod.BOTTLENECK,
        config=config,
        tensors=tensors,
        base_model="",
        size_bytes=0,
        num_parameters=0,
    )
    blocks = lower(artifact, BASE).deltas
    assert all(isinstance(block, Bottleneck) for block in blocks)
    return [block for block in blocks if isinstance(block, Bottleneck)]


class LibraryBlock:
    """One adapter, and how the library runs it inside a Llama layer: before, inside, after the adapter."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], site: Site) -> None:
        self.config = config
        self.tensors = tensors
        self.prefix = f"model.layers.{site.layer}.{MODULES[site.name]}.adapters.{NAME}."

    def stream_after(self, m: Tensor, r: Tensor) -> Tensor:
        """The layer's hidden states after the sub-layer, of its output m and of r that entered it."""
        x, residual = self.before(m, r)
        output = self.inside(x, residual)
        if self.config["is_parallel"]:
            output = output + m
        if self.config["original_ln_after"]:
            output = output + r
        return output

    def before(self, m: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        if self.config["is_parallel"]:
            return r, r
        x = m
        if self.config["original_ln_before"]:
            x = x + r
        return x, (m if self.config["residual_before_ln"] else x)

    def inside(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.config["ln_before"]:
            x = self.norm("adapter_norm_before", x)
        hidden = self.project(f"adapter_down.{int(self.config['ln_before'])}", "down", x)
        hidden = import_module("transformers.activations").get_activation(self.config["non_linearity"])(
            hidden
        )
        output = self.project("adapter_up", "up", hidden)
        scaling = self.config["scaling"]
        output = output * (self.tensor("scaling") if isinstance(scaling, str) else scaling)
        is_sequential = not self.config["is_parallel"]
        if is_sequential and self.config["adapter_residual_before_ln"]:
            output = output + residual
        if self.config["ln_after"]:
            output = self.norm("adapter_norm_after", output)
        if is_sequential and not self.config["adapter_residual_before_ln"]:
            output = output + residual
        return output

    def tensor(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def norm(self, name: str, x: Tensor) -> Tensor:
        norm = nn.LayerNorm(x.shape[-1])
        norm.load_state_dict({part: self.tensor(f"{name}.{part}") for part in ("weight", "bias")})
        normed: Tensor = norm(x)
        return normed

    def project(self, module: str, direction: str, x: Tensor) -> Tensor:
        if not self.config["phm_layer"]:
            return x @ self.tensor(f"{module}.weight").T + self.tensor(f"{module}.bias")
        w = self.factors(module, f"W_{direction}", "W", "shared_W_phm", "factorized_phm_W")
        rule = self.factors(module, "phm_rule", "phm_rule", "shared_phm_rule", "factorized_phm_rule")
        y = sum(x @ torch.kron(rule[i], w[i]) for i in range(self.config["phm_dim"]))
        assert isinstance(y, Tensor)
        return y + self.tensor(f"{module}.b") if self.config["phm_bias"] else y

    def factors(self, module: str, shared: str, own: str, is_shared: str, is_factorized: str) -> Tensor:
        name = f"{self.prefix}{module}.{own}"
        if self.config[is_shared]:
            name = f"model.shared_parameters.{NAME}.{shared}"
        if self.config[is_factorized]:
            return torch.stack(
                [
                    left @ right
                    for left, right in zip(
                        self.tensors[f"{name}_left"], self.tensors[f"{name}_right"], strict=True
                    )
                ]
            )
        return self.tensors[name]


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


@settings(max_examples=150, deadline=None)
@given(variant=VARIANTS, seed=st.integers(0, 2**31))
def test_lowered_block_is_the_librarys_forward(variant: dict[str, Any], seed: int) -> None:
    attention, feed_forward = variant.pop("places")
    if variant["phm_layer"] and variant["shared_W_phm"]:
        variant["reduction_factor"] = 4  # shared factors have one size
    fields = variant | {"phm_dim": 2, "phm_rank": 2, "mh_adapter": attention, "output_adapter": feed_forward}
    config = adapterhub_config(BASE, "seq_bn", **fields)
    tensors = adapterhub_tensors(BASE, config, seed=seed, scale=0.5)
    blocks = lowered_blocks(config, tensors)
    layers = [layer for layer in range(2) if layer not in variant["leave_out"]]
    names = [name for name, used in (("attention", attention), ("feed_forward", feed_forward)) if used]
    assert [block.site for block in blocks] == [Site(layer, name) for layer in layers for name in names]
    generator = torch.Generator().manual_seed(seed)
    m, r = torch.randn(2, 5, 16, generator=generator)
    for block in blocks:
        with torch.no_grad():
            expected = LibraryBlock(config["config"], tensors, block.site).stream_after(m, r)
        for run in (bottleneck, bottleneck_output):
            torch.testing.assert_close(r + run(block, r, m), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("preset", "flow"),
    [
        ("seq_bn", Flow(BottleneckInput.SUM, None, 1.0, 0.0)),
        ("double_seq_bn", Flow(BottleneckInput.OUTPUT, None, 1.0, 0.0)),
        ("par_bn", Flow(BottleneckInput.RESIDUAL, None, 1.0, 0.0)),
    ],
)
def test_well_known_variants_only_add_to_the_sub_layers_output(preset: str, flow: Flow) -> None:
    assert resolve_flow(parse_bottleneck_config(PRESETS[preset])) == flow


def test_adapter_plus_reads_the_sum_and_adds_to_the_output() -> None:
    fields = dict(PRESETS["seq_bn"]) | {
        "original_ln_after": False,
        "residual_before_ln": False,
        "scaling": "channel",
        "stochastic_depth": 0.1,
        "init_weights": "houlsby",
    }
    flow = resolve_flow(parse_bottleneck_config(fields))
    assert flow == Flow(BottleneckInput.SUM, None, 1.0, 0.0)


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
