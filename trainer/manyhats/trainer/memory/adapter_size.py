"""How many parameters a method trains and where its tensors act, computed from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.sites import BaseDescription
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.describe import describe
from manyhats.engine.model.layout import Family
from manyhats.trainer.data.head_task import HeadTask
from manyhats.trainer.methods.bottleneck import bottleneck_size
from manyhats.trainer.methods.head import head_shapes
from manyhats.trainer.methods.lora import plan_lora
from manyhats.trainer.methods.targets import choose_modules, with_named_modules
from manyhats.trainer.methods.virtual_tokens import check_virtual_token_limit
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)

_LIMITS = AdapterLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSize:
    """The properties of an adapter that determine memory use.

    Attributes:
        num_trained: trained parameters.
        num_lowered: values computed from them at each step, not counting the parameters themselves.
        ranks: name of a linear → R of its low-rank delta, the largest in any layer.
        rescaled_outputs: linears whose output is rescaled.
        rescaled_inputs: linears whose input is rescaled.
        bottlenecks: widths b of the bottlenecks in a layer.
        keeps_bottleneck_input: whether a bottleneck reads something that would not be kept otherwise.
        begins_behind: the part of the first layer that keeps nothing, because nothing before its end is trained.
        num_in_layers: virtual tokens that go through the layers.
        num_prefix: virtual tokens that are keys and values.
        has_dropout: whether low-rank deltas have dropout on their input.
        is_on_head: whether the output head has a low-rank delta.
    """

    num_trained: int
    num_lowered: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    rescaled_outputs: frozenset[str] = frozenset()
    rescaled_inputs: frozenset[str] = frozenset()
    bottlenecks: tuple[int, ...] = ()
    keeps_bottleneck_input: bool = False
    begins_behind: Literal["nothing", "attention", "layer"] = "nothing"
    num_in_layers: int = 0
    num_prefix: int = 0
    has_dropout: bool = False
    is_on_head: bool = False

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that it occupies in the base's context."""
        return self.num_in_layers + self.num_prefix


def adapter_size(settings: AdapterSettings, family: Family, head: HeadTask | None = None) -> AdapterSize:
    """The size of an adapter for a base.

    Args:
        settings: its method's.
        family: the base's.
        head: what its task's head learns; None if it has none.

    Raises:
        SettingError: a module does not exist in the base, a pattern matches none, or a size exceeds the server's limit.
    """
    size = _size(settings, family)
    check_virtual_token_limit(size.num_virtual_tokens, _LIMITS)
    if head is None:
        return size
    shapes = head_shapes(head, settings.method, _description(family))
    return replace(size, num_trained=size.num_trained + sum(map(math.prod, shapes.values())))


def _size(settings: AdapterSettings, family: Family) -> AdapterSize:
    architecture, base = family.architecture, _description(family)
    settings = with_named_modules(settings, base)
    match settings:
        case LoraSettings():
            return _lora(settings, base)
        case Ia3Settings():
            return _ia3(settings, base)
        case BottleneckSettings():
            return _bottleneck(settings, architecture)
        case PrefixSettings():
            return _prefix(settings, architecture)
        case PromptSettings():
            num_tokens = settings.num_virtual_tokens
            return AdapterSize(num_trained=num_tokens * architecture.embedding.size, num_in_layers=num_tokens)
        case PTuningSettings():
            return _p_tuning(settings, architecture)


def _description(family: Family) -> BaseDescription:
    return describe(family, names=(), digest="")


def _lora(settings: LoraSettings, base: BaseDescription) -> AdapterSize:
    """A [R, d_in] and B [d_out, R] for each module; for DoRA also magnitudes [d_out], a scaled B and output scales."""
    plan = plan_lora(settings, base, _LIMITS)
    ranks: dict[str, int] = {}
    num_trained = num_lowered = 0
    is_on_head = False
    for target in plan.chosen.targets:
        rank = plan.ranks[target.module]
        num_trained += rank * (target.d_in + target.d_out) + (target.d_out if settings.use_dora else 0)
        num_lowered += (rank + 1) * target.d_out if settings.use_dora else 0
        is_on_head |= target.is_head
        for part in target.parts:
            ranks[part.site.name] = max(ranks.get(part.site.name, 0), rank)
    ranks.pop("lm_head", None)
    return AdapterSize(
        num_trained=num_trained,
        num_lowered=num_lowered,
        ranks=ranks,
        rescaled_outputs=frozenset(ranks) if settings.use_dora else frozenset(),
        has_dropout=settings.dropout > 0,
        is_on_head=is_on_head,
    )


def _ia3(settings: Ia3Settings, base: BaseDescription) -> AdapterSize:
    """A factor for each output of ``output_modules`` and each input of ``input_modules``."""
    outputs = choose_modules(settings.output_modules, "output_modules", base).targets
    inputs = choose_modules(settings.input_modules, "input_modules", base).targets
    return AdapterSize(
        num_trained=sum(target.d_out for target in outputs) + sum(target.d_in for target in inputs),
        rescaled_outputs=frozenset(part.site.name for target in outputs for part in target.parts),
        rescaled_inputs=frozenset(part.site.name for target in inputs for part in target.parts),
    )


def _bottleneck(settings: BottleneckSettings, architecture: Architecture) -> AdapterSize:
    """D [b, D], its bias [b], U [D, b], its bias [D], b = D // reduction factor; two for ``double_seq``."""
    hidden = architecture.hidden_size
    width = bottleneck_size(settings, hidden)
    num_sites = 2 if settings.variant == "double_seq" else 1
    per_site = 2 * width * hidden + width + hidden
    return AdapterSize(
        num_trained=architecture.num_sets * num_sites * per_site,
        bottlenecks=(width,) * num_sites,
        keeps_bottleneck_input=settings.variant != "parallel",
        begins_behind="attention" if settings.variant == "double_seq" else "layer",
    )


def _prefix(settings: PrefixSettings, architecture: Architecture) -> AdapterSize:
    """Keys and values [P, 2 · L · Hkv · K]; or an embedding [P, Hkv · K] and the two linears that produce them."""
    num_tokens, inner = settings.num_virtual_tokens, settings.projection_size
    token_dim = architecture.attention.key_size
    width = 2 * architecture.num_layers * token_dim
    num_made = num_tokens * width
    num_trained = num_made
    if inner:
        num_trained = num_tokens * token_dim + (token_dim + 1) * inner + (inner + 1) * width
        num_made = 2 * num_made
    return AdapterSize(num_trained=num_trained, num_lowered=num_made, num_prefix=num_tokens)


def _p_tuning(settings: PTuningSettings, architecture: Architecture) -> AdapterSize:
    """An embedding [P, E], and linears E → h → h → E with biases."""
    num_tokens, inner, size = settings.num_virtual_tokens, settings.encoder_size, architecture.embedding.size
    mlp = (size + 1) * inner + (inner + 1) * inner + (inner + 1) * size
    return AdapterSize(
        num_trained=num_tokens * size + mlp,
        num_lowered=num_tokens * (size + 2 * inner),
        num_in_layers=num_tokens,
    )
