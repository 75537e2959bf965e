"""What AdapterHub's LoRA and IA3 share: ``LoRAConfig``, and the modules that their tensors name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from manyhats.adapters.errors import AdapterInvalidError, shown
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.adapterhub.fields import (
    read_count,
    read_flag,
    read_leave_out,
    read_number,
    refuse_unserved,
)
from manyhats.adapters.formats.adapterhub.tensors import TensorNames, check_layers, full_path, refuse_tensor
from manyhats.adapters.sites import BaseDescription, Site

_KNOWN = frozenset(
    (
        "architecture",
        "r",
        "alpha",
        "attn_matrices",
        "selfattn_lora",
        "intermediate_lora",
        "output_lora",
        "leave_out",
        "composition_mode",
        # These matter only in training, or show in the tensors.
        "dropout",
        "dtype",
        "init_weights",
        "init_weights_seed",
    )
)
_REFUSED = {
    "use_gating": "a gate, which averages over the whole sequence",
    "use_dora": "DoRA as AdapterHub computes it",
    "vera_d": "VeRA",
    "vera_b": "VeRA",
}
_ATTENTION: Mapping[str, str] = MappingProxyType({"q_proj": "q", "k_proj": "k", "v_proj": "v"})
# Of the attention, and yet with no letter.
_OUTPUT = "o_proj"


@dataclass(frozen=True, slots=True)
class LorasConfig:
    """The part of the config that determines the maths.

    Attributes:
        rank: R.
        alpha: as this version of the library means it.
        attention: letters of the adapted attention matrices.
        is_in_feed_forward: whether the config places any in the feed-forward block. Which linears those are
            differs by architecture, so the tensors decide.
        leave_out: layers without adapters.
    """

    rank: int
    alpha: float
    attention: frozenset[str]
    is_in_feed_forward: bool
    leave_out: frozenset[int]


@dataclass(frozen=True, slots=True)
class AdaptedLinear:
    """One linear of the base that the file holds tensors for: part (``lora_B``) → its plain name."""

    site: Site
    parts: Mapping[str, str]


def parse_loras_config(config: Mapping[str, Any]) -> LorasConfig:
    """Read an AdapterHub LoRA config; fields left out have the library's defaults.

    Raises:
        AdapterUnsupportedError: a field needs something that is not computed here, or is unknown; ``subject`` is it.
        AdapterInvalidError: a field has the wrong type or is out of range.
    """
    refuse_unserved(config, known=_KNOWN, refused=_REFUSED)
    matrices = config.get("attn_matrices", ["q", "v"])
    if not isinstance(matrices, list) or not all(isinstance(letter, str) for letter in matrices):
        raise AdapterInvalidError("attn_matrices", "must be a list of letters")
    is_in_attention = read_flag(config, "selfattn_lora", True)
    return LorasConfig(
        rank=read_count(config, "r", 8),
        alpha=read_number(config, "alpha", 8),
        attention=frozenset(matrices) if is_in_attention else frozenset(),
        is_in_feed_forward=read_flag(config, "intermediate_lora", False)
        or read_flag(config, "output_lora", False),
        leave_out=read_leave_out(config),
    )


def read_config(config: Mapping[str, Any], base: BaseDescription) -> tuple[LorasConfig, str]:
    """The parsed method config, and the adapter's own name.

    Raises:
        ArtifactError: as ``parse_loras_config``.
        BaseMismatchError: the config was made for another base.
    """
    adapterhub_format.check_base(config, base)
    parsed = parse_loras_config(adapterhub_format.method_config(config))
    return parsed, adapterhub_format.adapter_name(config)


def find_linears(
    config: LorasConfig, name: str, names: TensorNames, base: BaseDescription
) -> list[AdaptedLinear]:
    """The adapted linears, ordered by site; every tensor belongs to one.

    The library ignores tensors that its config does not ask for, so these are refused: they would be served although
    they were never used in training.

    Raises:
        AdapterUnsupportedError, AdapterInvalidError: a tensor belongs to no linear, or contradicts the config.
        BaseMismatchError: the adapter has more layers than the base.
    """
    check_layers(names, base)
    marker = f".loras.{name}."
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for plain in names:
        module, found, part = plain.partition(marker)
        if not found or part not in ("lora_A", "lora_B"):
            refuse_tensor(names.names(plain)[0])
        parts[module][part] = plain
    linears = []
    for module, found_parts in parts.items():
        tensor = names.names(next(iter(found_parts.values())))[0]
        site = _site_of(full_path(module), base)
        if site is None:
            raise AdapterInvalidError(
                tensor, f"acts on {shown(full_path(module))}, which is not a linear of the base"
            )
        _check_place(config, site, tensor)
        linears.append(AdaptedLinear(site, found_parts))
    return sorted(linears, key=lambda linear: linear.site)


def _site_of(path: str, base: BaseDescription) -> Site | None:
    """The linear that is a module by itself; None if there is none."""
    parts = base.modules.get(path, ())
    return parts[0].site if len(parts) == 1 and parts[0].site.name in base.linears else None


def _check_place(config: LorasConfig, site: Site, tensor: str) -> None:
    if site.layer in config.leave_out:
        raise AdapterInvalidError(tensor, f"is in layer {site.layer}, which leave_out names")
    if site.name in _ATTENTION:
        if _ATTENTION[site.name] not in config.attention:
            raise AdapterInvalidError(tensor, "is in an attention matrix that attn_matrices does not name")
    elif site.name != _OUTPUT and not config.is_in_feed_forward:
        raise AdapterInvalidError(
            tensor, "is in the feed-forward block, and neither intermediate_lora nor output_lora is set"
        )
