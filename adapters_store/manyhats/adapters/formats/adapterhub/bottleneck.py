"""AdapterHub's bottleneck config (``BnConfig``), field by field, and the tensors that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyhats.adapters.activations import activation_name
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError, shown
from manyhats.adapters.formats.adapterhub.fields import (
    check_number,
    read_count,
    read_flag,
    read_leave_out,
    refuse_unserved,
)
from manyhats.adapters.formats.adapterhub.places import places_of
from manyhats.adapters.sites import BaseDescription

_KNOWN = frozenset(
    (
        "architecture",
        "mh_adapter",
        "output_adapter",
        "reduction_factor",
        "non_linearity",
        "original_ln_before",
        "original_ln_after",
        "ln_before",
        "ln_after",
        "is_parallel",
        "scaling",
        "residual_before_ln",
        "adapter_residual_before_ln",
        "leave_out",
        "use_gating",
        "inv_adapter",
        "inv_adapter_reduction_factor",
        "phm_layer",
        "phm_dim",
        "phm_rank",
        "phm_bias",
        "factorized_phm_W",
        "shared_W_phm",
        "shared_phm_rule",
        "factorized_phm_rule",
        # These matter only in training, or belong to features that are refused when used.
        "dropout",
        "stochastic_depth",
        "init_weights",
        "init_weights_seed",
        "phm_c_init",
        "phm_init_range",
        "learn_phm",
        "hypercomplex_nonlinearity",
    )
)
_SUM = "post_add"
_REFUSED = {
    "invertible_adapter": "an invertible adapter as adapter-transformers saved it",
    "cross_adapter": "an adapter after cross-attention, which no decoder here has",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhmConfig:
    """How the projections of a Compacter are put together; ``dim`` is n, the number of Kronecker products.

    Attributes:
        dim: n.
        rank: of the factors of W.
        has_bias: whether projections have one.
        is_w_factorized, is_w_shared: of the larger factors W.
        is_rule_factorized, is_rule_shared: of the [n, n, n] rule.

    Source: Mahabadi et al. 2021 (arXiv:2106.04647).
    """

    dim: int
    rank: int
    has_bias: bool
    is_w_factorized: bool
    is_w_shared: bool
    is_rule_factorized: bool
    is_rule_shared: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckConfig:
    """The part of the config that determines the maths; ``methods/bottleneck.py`` says how.

    Attributes:
        sub_layers: ``attention``, ``feed_forward`` or both.
        reduction_factor: hidden size over bottleneck size, by layer if a mapping gives it.
        default_reduction_factor: of the other layers; None if the mapping has no default.
        activation: a name in ``ACTIVATIONS``.
        scaling: a constant, ``learned`` (one number) or ``channel`` (one per channel).
        residual_is_sum: whether ``residual_before_ln`` is ``post_add``.
        leave_out: layers without adapters.
        is_gated: whether each adapter has a gate.
        coupling_factor: half the embedding's size over that of the invertible adapter's networks; None for none.
        phm: None for plain matrices.
    """

    sub_layers: tuple[str, ...]
    reduction_factor: Mapping[int, float]
    default_reduction_factor: float | None
    activation: str
    is_parallel: bool
    original_ln_before: bool
    original_ln_after: bool
    residual_before_ln: bool
    residual_is_sum: bool
    adapter_residual_before_ln: bool
    ln_before: bool
    ln_after: bool
    scaling: float | str
    leave_out: frozenset[int]
    is_gated: bool
    coupling_factor: float | None
    phm: PhmConfig | None

    def size(self, layer: int, hidden_size: int) -> int:
        """b, the bottleneck size of a layer: the hidden size over the reduction factor, rounded down, at least 1.

        Raises:
            AdapterInvalidError: the config has no factor for the layer.
        """
        factor = self.reduction_factor.get(layer, self.default_reduction_factor)
        if factor is None:
            raise AdapterInvalidError("reduction_factor", f"has no value for layer {layer}, and no default")
        return max(1, int(hidden_size // factor))


def parse_bottleneck_config(config: Mapping[str, Any]) -> BottleneckConfig:
    """Read an AdapterHub bottleneck config; missing fields have the library's defaults.

    Raises:
        AdapterUnsupportedError: a field needs something that is not computed here, or is unknown; ``subject`` is it.
        AdapterInvalidError: a field has the wrong type or is out of range.
    """
    refuse_unserved(config, known=_KNOWN, refused=_REFUSED)
    is_parallel = read_flag(config, "is_parallel", False)
    factors, default = _read_reduction(config.get("reduction_factor"))
    places = {
        "attention": read_flag(config, "mh_adapter", False),
        "feed_forward": read_flag(config, "output_adapter", False),
    }
    if not any(places.values()):
        raise AdapterInvalidError("output_adapter", "neither it nor mh_adapter is set: there is no adapter")
    return BottleneckConfig(
        sub_layers=tuple(name for name, is_used in places.items() if is_used),
        reduction_factor=factors,
        default_reduction_factor=default,
        activation=activation_name("non_linearity", config.get("non_linearity")),
        is_parallel=is_parallel,
        original_ln_before=read_flag(config, "original_ln_before", False),
        original_ln_after=read_flag(config, "original_ln_after", True),
        residual_before_ln=config.get("residual_before_ln") == _SUM
        or read_flag(config, "residual_before_ln", True),
        residual_is_sum=_is_residual_the_sum(config, is_parallel),
        adapter_residual_before_ln=read_flag(config, "adapter_residual_before_ln", False),
        ln_before=read_flag(config, "ln_before", False),
        ln_after=read_flag(config, "ln_after", False),
        scaling=_read_scaling(config.get("scaling", 1.0)),
        leave_out=read_leave_out(config),
        is_gated=read_flag(config, "use_gating", False),
        coupling_factor=_read_coupling_factor(config),
        phm=_read_phm(config) if read_flag(config, "phm_layer", False) else None,
    )


def _is_residual_the_sum(config: Mapping[str, Any], is_parallel: bool) -> bool:
    if config.get("residual_before_ln") != _SUM or is_parallel:  # where it is not read
        return False
    if not read_flag(config, "original_ln_before", False):
        raise AdapterUnsupportedError(
            "residual_before_ln", "'post_add' needs original_ln_before; without it the library itself fails"
        )
    return True


def _read_coupling_factor(config: Mapping[str, Any]) -> float | None:
    kind = config.get("inv_adapter")
    if kind is None:
        return None
    if kind != "nice":
        raise AdapterUnsupportedError(
            "inv_adapter",
            f"is '{shown(str(kind))}'; only nice is served: the library cannot run its other kind",
        )
    factor = check_number("inv_adapter_reduction_factor", config.get("inv_adapter_reduction_factor"))
    if factor < 1e-3:
        raise AdapterInvalidError("inv_adapter_reduction_factor", f"must be at least 0.001, not {factor:g}")
    return factor


def _read_reduction(value: Any) -> tuple[Mapping[int, float], float | None]:
    if not isinstance(value, dict):
        return {}, _check_factor(value)
    factors: dict[int, float] = {}
    default = None
    for key, factor in value.items():
        if key == "default":
            default = _check_factor(factor)
        elif key.isdecimal() and key.isascii() and len(key) < 7 and key == str(int(key)):
            factors[int(key)] = _check_factor(factor)
        else:
            raise AdapterInvalidError(
                "reduction_factor", f"has the key '{shown(key)}', which is neither a layer nor default"
            )
    return factors, default


def _check_factor(value: Any) -> float:
    factor = check_number("reduction_factor", value)
    if factor < 1e-3:
        raise AdapterInvalidError("reduction_factor", f"must be at least 0.001, not {factor:g}")
    return factor


def _read_scaling(value: Any) -> float | str:
    if value in ("learned", "channel"):
        return str(value)
    if isinstance(value, str):
        raise AdapterInvalidError("scaling", f"must be a number, learned or channel, not '{shown(value)}'")
    return check_number("scaling", value)


def _read_phm(config: Mapping[str, Any]) -> PhmConfig:
    return PhmConfig(
        dim=read_count(config, "phm_dim", 4),
        rank=read_count(config, "phm_rank", 1),
        has_bias=read_flag(config, "phm_bias", True),
        is_w_factorized=read_flag(config, "factorized_phm_W", True),
        is_w_shared=read_flag(config, "shared_W_phm", False),
        is_rule_factorized=read_flag(config, "factorized_phm_rule", False),
        is_rule_shared=read_flag(config, "shared_phm_rule", True),
    )


# What the config asks for


@dataclass(frozen=True, slots=True)
class Block:
    """One adapter: the plain names of its module and of what all adapters share, and its sizes."""

    layer: int
    sub_layer: str
    module: str
    shared: str
    size: int


def blocks(config: BottleneckConfig, name: str, base: BaseDescription) -> list[Block]:
    """Every adapter of the config, ordered by layer and sub-layer.

    Args:
        config: parsed.
        name: the adapter's own, inside its tensors' names.
        base: whose layers they lie in.
    """
    places = places_of(base.model_type)
    return [
        Block(
            layer=layer,
            sub_layer=sub_layer,
            module=f"{places.module(layer, sub_layer)}.adapters.{name}.",
            shared=f"shared_parameters.{name}.",
            size=config.size(layer, base.hidden_size),
        )
        for layer in range(base.num_layers)
        if layer not in config.leave_out
        for sub_layer in config.sub_layers
    ]


def plain_block_name(plain: str, config: BottleneckConfig) -> str:
    """The one name of a tensor that the library holds under two: ``ln_before``'s norm is in ``adapter_down`` too."""
    if not config.ln_before:
        return plain
    for part in ("weight", "bias"):
        if plain.endswith(f".adapter_down.0.{part}"):
            return plain.removesuffix(f"adapter_down.0.{part}") + f"adapter_norm_before.{part}"
    return plain
