"""What AdapterHub's LoRA and IA3 share: ``LoRAConfig``, and the modules that their tensors name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from manyhats.adapters.errors import AdapterInvalidError, shown
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.adapterhub.fields import (
    check_gating,
    read_count,
    read_flag,
    read_leave_out,
    read_number,
    refuse_unserved,
)
from manyhats.adapters.formats.adapterhub.tensors import (
    TensorNames,
    check_expected,
    check_layers,
    full_path,
    gate_shapes,
    refuse_tensor,
)
from manyhats.adapters.sites import BaseDescription, Part, Site

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
        "use_gating",
        # These matter only in training, or show in the tensors.
        "dropout",
        "dtype",
        "init_weights",
        "init_weights_seed",
    )
)
_REFUSED = {
    "use_dora": "DoRA as AdapterHub computes it",
    "vera_d": "VeRA",
    "vera_b": "VeRA",
}
_PARTS = ("lora_A", "lora_B")
_GATE_PARTS = ("gate.weight", "gate.bias")
_ATTENTION: Mapping[str, str] = MappingProxyType({"q_proj": "q", "k_proj": "k", "v_proj": "v"})
# Of the attention, and yet with no letter.
_OUTPUT = "o_proj"
# Where the library adapts some of a module's queries, keys and values in one LoRA.
_MERGED = frozenset(("gpt2",))


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
        is_gated: whether each delta has a gate, in place of its constant factor.
    """

    rank: int
    alpha: float
    attention: frozenset[str]
    is_in_feed_forward: bool
    leave_out: frozenset[int]
    is_gated: bool


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """A module of the base that the file holds tensors for.

    Attributes:
        linears: those that are adapted: one, or some of the queries, keys and values that the module computes.
        is_merged: whether the module computes queries, keys and values.
        parts: part (``lora_B``) → its plain name.
        gate: plain name of the gate's module, with a dot at its end; None for none.
    """

    linears: tuple[Part, ...]
    is_merged: bool
    parts: Mapping[str, str]
    gate: str | None

    @property
    def site(self) -> Site:
        """Of the first linear."""
        return self.linears[0].site

    def split(self, b: Tensor) -> tuple[Tensor, ...]:
        """A tensor of the adapted output rows ([d_out] or [d_out, n]), linear by linear, as they are computed."""
        (first, *others) = self.linears
        if others:
            return b.chunk(len(self.linears))
        return (b if isinstance(first.rows, range) else b[list(first.rows)],)


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
        is_gated=read_flag(config, "use_gating", False),
    )


def read_config(config: Mapping[str, Any], base: BaseDescription) -> tuple[LorasConfig, str]:
    """The parsed method config, and the adapter's own name.

    Raises:
        ArtifactError: as ``parse_loras_config``.
        BaseMismatchError: the config was made for another base.
    """
    adapterhub_format.check_base(config, base)
    inner = adapterhub_format.method_config(config)
    check_gating(inner, base)
    parsed = parse_loras_config(inner)
    return parsed, adapterhub_format.adapter_name(config)


def find_modules(
    config: LorasConfig, name: str, names: TensorNames, base: BaseDescription
) -> list[AdaptedModule]:
    """The adapted modules, ordered by site; every tensor belongs to one.

    The library ignores tensors that its config does not ask for, so these are refused: they would be served although
    they were never used in training.

    Raises:
        AdapterUnsupportedError, AdapterInvalidError: a tensor belongs to no module, or contradicts the config.
        BaseMismatchError: the adapter has more layers than the base.
    """
    check_layers(names, base)
    marker = f".loras.{name}."
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    gates: dict[str, str] = {}
    for plain in names:
        module, found, part = plain.partition(marker)
        if found and part in _PARTS:
            parts[module][part] = plain
        elif found and part in _GATE_PARTS and config.is_gated:
            gates.setdefault(module, plain)
        else:
            refuse_tensor(names.names(plain)[0])
    for module in gates.keys() - parts.keys():
        refuse_tensor(names.names(gates[module])[0])
    modules = []
    for module, found_parts in parts.items():
        tensor, path = names.names(next(iter(found_parts.values())))[0], full_path(base, module)
        linears = _linears_of(config, path, base)
        if not linears:
            raise AdapterInvalidError(tensor, f"acts on {shown(path)}, which is not a linear of the base")
        for linear in linears:
            _check_place(config, linear.site, tensor)
        gate = f"{module}{marker}gate." if config.is_gated else None
        modules.append(AdaptedModule(linears, len(base.modules[path]) > 1, found_parts, gate))
    return sorted(modules, key=lambda module: module.site)


def _linears_of(config: LorasConfig, path: str, base: BaseDescription) -> tuple[Part, ...]:
    """What is adapted of a module: the linear that it is, or those of a merged one that the config names."""
    parts = base.modules.get(path, ())
    if any(part.site.name not in base.linears or part.site.is_of_mixture for part in parts):
        return ()
    if len(parts) > 1:
        is_merged = base.model_type in _MERGED
        return tuple(part for part in parts if is_merged and _ATTENTION[part.site.name] in config.attention)
    return parts


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


def check_gate(
    module: AdaptedModule, names: TensorNames, shapes: Mapping[str, tuple[int, ...]], base: BaseDescription
) -> None:
    """Check that a gate is there, if the config asks for it, and fits.

    Raises:
        AdapterInvalidError: names the tensor.
    """
    if module.gate is not None:
        check_expected(names, shapes, gate_shapes(module.gate, base.linears[module.site.name][0]), base)
