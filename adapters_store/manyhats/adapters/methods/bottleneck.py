"""Bottleneck adapters: a small network on a sub-layer's output, as AdapterHub saves it.

Every variant of the library's config that a model here can run is one ``Bottleneck`` primitive. In the library's
terms, with r the residual stream that enters the sub-layer, m the sub-layer's output, N the norm of their sum that
follows it (BERT's; Llama's and GPT-2's layers have none to pass, and N(x) is x), and ``f(x) = g · scale · (U · act(D ·
norm_before(x) + b_d) + b_u)``, g the mean of a gate over the rows x of a text, with ``use_gating``, else 1:

Sequential. The input is ``x = N(r + m)`` with ``original_ln_before``, else ``x = m``. The residual around the
bottleneck is ``ρ = x`` without ``residual_before_ln``, ``ρ = m`` with it, and ``ρ = r + m`` if it is ``post_add``. Then

    o = f(x) + ρ                        without ``ln_after``
    o = norm_after(f(x)) + ρ            with ``ln_after``
    o = norm_after(f(x) + ρ)            with ``ln_after`` and ``adapter_residual_before_ln``

Parallel (``is_parallel``). ``x = r``, whatever the other flags say, and ``o = m + f(x)``, or
``o = m + norm_after(f(x))`` with ``ln_after``.

The layer's output is ``N(r + o)`` with ``original_ln_after`` and ``o`` without. The primitive's stream continues as
``N(r + m')``, or ``r + m'`` if it skips the norm, so ``m' = o`` or ``m' = o − r``. With ``m' = keep · m + carry · r +
carry_normed · N(r + m) + (f, or norm_after(f + ρ))``:

    keep          1 where ρ is m or r + m outside ``norm_after``, and in parallel; else 0
    carry         1 where ρ is r + m outside ``norm_after``, else 0; less 1 without ``original_ln_after``
    carry_normed  1 where ρ is N(r + m) outside ``norm_after``, else 0

Three things depend on the base. On ALBERT the library swaps the arguments of the attention's adapters: there r is the
attention's output and m the stream, and ``N(m + o)`` is as above with keep and carry exchanged. Where the library hooks
into the layers (qwen2, qwen3), it refuses ``original_ln_after = false``, and so does this. On Gemma 2 and 3 its
adapters lie before the norm that follows a sub-layer, and some use the norm of the *last* layer in every layer: these
are refused.

Source: Houlsby et al. 2019 (arXiv:1902.00751); Pfeiffer et al. 2021 (arXiv:2005.00247); He et al. 2022
(arXiv:2110.04366); Steitz and Roth 2024 (arXiv:2406.06820).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterUnsupportedError, shown
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.adapterhub.bottleneck import (
    Block,
    BottleneckConfig,
    blocks,
    parse_bottleneck_config,
    plain_block_name,
)
from manyhats.adapters.formats.adapterhub.coupling import coupling_shapes, lower_couplings
from manyhats.adapters.formats.adapterhub.fields import check_gating
from manyhats.adapters.formats.adapterhub.phm import phm_matrix, phm_shapes
from manyhats.adapters.formats.adapterhub.places import check_encoder, places_of
from manyhats.adapters.formats.adapterhub.tensors import (
    TensorNames,
    check_layers,
    check_shapes,
    gate_shapes,
    plain_name,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate
from manyhats.adapters.primitives import Bottleneck, BottleneckInput, Gate, LayerNorm, LoweredAdapter
from manyhats.adapters.sites import BaseDescription, Site

_BUILT_IN = frozenset(
    ("albert", "bert", "distilbert", "electra", "gpt2", "gptj", "llama", "mistral", "roberta", "xlm-roberta")
)
_HOOKED = frozenset(("qwen2", "qwen3"))
_SANDWICHED = frozenset(("gemma2", "gemma3", "gemma3_text"))

_PARTS = ("weight", "bias")


def can_change_output(delta: Bottleneck) -> bool:
    """Whether m' can differ from m; a parallel adapter, for example, is initialised so that it does not."""
    is_added = delta.keep == 1 and delta.carry == delta.carry_normed == 0 and delta.norm_after is None
    parts = (delta.up, delta.up_bias)
    return (
        not is_added
        or delta.skips_norm
        or (bool(delta.scale.any()) and any(bool(part.any()) for part in parts))
    )


@dataclass(frozen=True, slots=True)
class Flow:
    """How a variant's terms are combined: the primitive's fields of the same names."""

    input: BottleneckInput
    norm_residual: BottleneckInput | None
    keep: float
    carry: float
    carry_normed: float = 0.0
    skips_norm: bool = False


_SWAPPED = {
    BottleneckInput.OUTPUT: BottleneckInput.RESIDUAL,
    BottleneckInput.RESIDUAL: BottleneckInput.OUTPUT,
}


def swapped(flow: Flow) -> Flow:
    """The same flow where the library takes r for m and m for r: ``N(m + o) = N(r + m')``."""
    residual = flow.norm_residual
    return replace(
        flow,
        input=_SWAPPED.get(flow.input, flow.input),
        norm_residual=None if residual is None else _SWAPPED.get(residual, residual),
        keep=flow.carry + 1.0,
        carry=flow.keep - 1.0,
    )


def resolve_flow(config: BottleneckConfig, has_norm: bool) -> Flow:
    """The flow of a variant, on a base that norms the stream behind its sub-layers or not; derived above."""
    lost = 0.0 if config.original_ln_after else -1.0
    skips_norm = has_norm and not config.original_ln_after
    if config.is_parallel:
        return Flow(BottleneckInput.RESIDUAL, None, keep=1.0, carry=lost, skips_norm=skips_norm)
    summed = BottleneckInput.NORMED if has_norm else BottleneckInput.SUM
    source = summed if config.original_ln_before else BottleneckInput.OUTPUT
    residual = BottleneckInput.OUTPUT if config.residual_before_ln else source
    if config.residual_is_sum:
        residual = BottleneckInput.SUM
    if config.ln_after and config.adapter_residual_before_ln:
        return Flow(source, residual, keep=0.0, carry=lost, skips_norm=skips_norm)
    return Flow(
        source,
        None,
        keep=0.0 if residual is BottleneckInput.NORMED else 1.0,
        carry=lost + (residual is BottleneckInput.SUM),
        carry_normed=float(residual is BottleneckInput.NORMED),
        skips_norm=skips_norm,
    )


@dataclass(frozen=True, slots=True)
class BottleneckMethod:
    """Bottleneck adapters from an AdapterHub directory; config and tensors must agree one to one."""

    @property
    def method(self) -> AdapterMethod:
        """BOTTLENECK."""
        return AdapterMethod.BOTTLENECK

    def check_base(self, base: BaseDescription) -> None:
        """Refuse a family whose layers are not as the derivation needs them."""
        if base.model_type in _SANDWICHED:
            raise AdapterUnsupportedError(
                "model_type",
                f"on {base.model_type} AdapterHub's bottlenecks lie before the norm that follows a sub-layer, and "
                "original_ln_before uses the last layer's norm in every layer; they are not served there",
            )
        if base.model_type not in _BUILT_IN | _HOOKED:
            raise AdapterUnsupportedError(
                "model_type",
                f"AdapterHub does not define where its bottlenecks lie on {shown(base.model_type)}; they are served on "
                + ", ".join(sorted(_BUILT_IN | _HOOKED)),
            )

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: no tensor missing, left over or of another shape."""
        self.check_base(base)
        config, name = _read_config(candidate.config, base)
        _find_blocks(config, name, candidate.shapes, base)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """One ``Bottleneck`` per adapted sub-layer, ordered by layer, then those of an invertible adapter.

        Matrices keep their stored dtype.
        """
        self.check_base(base)
        shapes = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
        config, name = _read_config(artifact.config, base)
        found, names = _find_blocks(config, name, shapes, base)
        places = places_of(base.model_type)
        flow = resolve_flow(config, places.is_normed)
        flows = {"attention": swapped(flow) if places.is_swapped else flow, "feed_forward": flow}
        read = partial(names.pick, artifact.tensors)
        deltas = [_lower_block(config, flows[block.sub_layer], block, read) for block in found]
        if config.coupling_factor is not None:
            deltas += lower_couplings(name, base.embedding_size, config.activation, read)
        return LoweredAdapter(digest=artifact.digest, deltas=tuple(deltas))


def _find_blocks(
    config: BottleneckConfig, name: str, shapes: Mapping[str, tuple[int, ...]], base: BaseDescription
) -> tuple[list[Block], TensorNames]:
    """Every adapter that the config asks for, if the tensors match, one to one."""
    names = TensorNames(shapes, partial(_plain, config, base))
    check_layers(names, base)
    found = blocks(config, name, base)
    expected: dict[str, tuple[int, ...]] = {}
    for block in found:
        expected |= _block_shapes(config, block, base.hidden_size)
    if config.coupling_factor is not None:
        expected |= coupling_shapes(name, base.embedding_size, config.coupling_factor)
    check_shapes(names, shapes, expected, base)
    return found, names


def _plain(config: BottleneckConfig, base: BaseDescription, name: str) -> str:
    return plain_block_name(plain_name(base, name), config)


def _read_config(config: Mapping[str, Any], base: BaseDescription) -> tuple[BottleneckConfig, str]:
    """The parsed config and the adapter's name, if the base's layers are as the derivation needs them."""
    adapterhub_format.check_base(config, base)
    inner = adapterhub_format.method_config(config)
    check_gating(inner, base)
    if inner.get("inv_adapter") is not None:
        check_encoder(
            base,
            "inv_adapter",
            "an invertible adapter on the embedding, whose inverse a decoder's head would need",
        )
    parsed = parse_bottleneck_config(inner)
    if base.model_type in _HOOKED and not parsed.original_ln_after:
        raise AdapterUnsupportedError(
            "original_ln_after", f"must be true on {base.model_type}, where the library allows nothing else"
        )
    if parsed.residual_is_sum and not places_of(base.model_type).is_normed:
        raise AdapterUnsupportedError(
            "residual_before_ln",
            "'post_add' needs a norm after the sub-layer; on a base without one the library itself fails",
        )
    return parsed, adapterhub_format.adapter_name(config)


def _down_module(config: BottleneckConfig, block: Block) -> str:
    # The norm, if any, is the first in the same sequence.
    return f"{block.module}adapter_down.{int(config.ln_before)}."


def _up_module(block: Block) -> str:
    return f"{block.module}adapter_up."


def _block_shapes(config: BottleneckConfig, block: Block, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """What one adapter consists of, by plain name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, direction, d_in, d_out in (
        (_down_module(config, block), "down", hidden_size, block.size),
        (_up_module(block), "up", block.size, hidden_size),
    ):
        if config.phm is None:
            shapes |= {f"{module}weight": (d_out, d_in), f"{module}bias": (d_out,)}
        else:
            shapes |= phm_shapes(config.phm, block, module, direction, d_in, d_out)
    for norm, is_used in (("before", config.ln_before), ("after", config.ln_after)):
        if is_used:
            shapes |= {f"{block.module}adapter_norm_{norm}.{part}": (hidden_size,) for part in _PARTS}
    if isinstance(config.scaling, str):
        shapes[f"{block.module}scaling"] = (1,) if config.scaling == "learned" else (hidden_size,)
    return shapes | (gate_shapes(f"{block.module}gate.", hidden_size) if config.is_gated else {})


def _lower_block(
    config: BottleneckConfig, flow: Flow, block: Block, read: Callable[[str], Tensor]
) -> Bottleneck:
    down, down_bias = _projection(config, block, _down_module(config, block), "down", read)
    up, up_bias = _projection(config, block, _up_module(block), "up", read)
    is_learned = isinstance(config.scaling, str)
    return Bottleneck(
        site=Site(block.layer, block.sub_layer),
        input=flow.input,
        down=down,
        down_bias=down_bias,
        up=up,
        up_bias=up_bias,
        activation=config.activation,
        scale=read(f"{block.module}scaling")
        if is_learned
        else torch.tensor([float(config.scaling)], device=up.device),
        norm_before=_norm(block, "before", read) if config.ln_before else None,
        norm_after=_norm(block, "after", read) if config.ln_after else None,
        norm_residual=flow.norm_residual,
        keep=flow.keep,
        carry=flow.carry,
        carry_normed=flow.carry_normed,
        skips_norm=flow.skips_norm,
        gate=Gate(*(read(f"{block.module}gate.{part}") for part in _PARTS)) if config.is_gated else None,
    )


def _projection(
    config: BottleneckConfig, block: Block, module: str, direction: str, read: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor]:
    """Matrix [d_out, d_in] and bias [d_out] of one projection."""
    if config.phm is None:
        return read(f"{module}weight"), read(f"{module}bias")
    matrix = phm_matrix(config.phm, block, module, direction, lambda name: read(name).float())
    return matrix, read(f"{module}b") if config.phm.has_bias else torch.zeros(matrix.shape[0])


def _norm(block: Block, which: str, read: Callable[[str], Tensor]) -> LayerNorm:
    module = f"{block.module}adapter_norm_{which}."
    return LayerNorm(weight=read(f"{module}weight"), bias=read(f"{module}bias"))
