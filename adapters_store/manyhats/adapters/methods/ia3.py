"""IA3: trained factors of linears' outputs, or of their inputs, as PEFT and AdapterHub save it.

With a vector l, a linear's output, bias included, becomes ``y ⊙ l``, l [d_out] (keys and values), or its input
``x ⊙ l``, l [d_in] (inside the feed-forward).

Source: Liu et al. 2022 (arXiv:2205.05638), section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.formats.adapterhub.loras import (
    AdaptedModule,
    LorasConfig,
    check_gate,
    find_modules,
    read_config,
)
from manyhats.adapters.formats.adapterhub.tensors import TensorNames, pick_gate, plain_names
from manyhats.adapters.formats.peft.fields import check_fields
from manyhats.adapters.formats.peft.module_selection import LAYERS, LAYERS_PATTERN, check_selected
from manyhats.adapters.formats.peft.saved_modules import SavedModules, find_saved_modules
from manyhats.adapters.formats.peft.tensors import (
    Misfit,
    ModuleTensors,
    Target,
    candidate_of,
    find_misfit,
    find_target,
    group_tensors,
    missing_module,
    raise_misfits,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate, OnAnyBase
from manyhats.adapters.primitives import Affine, InputScale, LoweredAdapter
from manyhats.adapters.sites import BaseDescription

_VECTOR = "ia3_l"
_FIELDS = frozenset(("feedforward_modules", "init_ia3_weights", "modules_to_save"))


@dataclass(frozen=True, slots=True)
class Ia3Method(OnAnyBase):
    """IA3 from a PEFT directory; a vector's shape says whether it rescales inputs or outputs."""

    @property
    def method(self) -> AdapterMethod:
        """IA3."""
        return AdapterMethod.IA3

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: every tensor must be used, and fit."""
        placed, _ = _place(candidate, base)
        modules = [names for _, names in placed]
        check_selected(candidate.config, modules, base, unread=(LAYERS, LAYERS_PATTERN))

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """An ``Affine`` or an ``InputScale`` per linear, float32, ordered by site."""
        placed, saved = _place(candidate_of(artifact), base)
        deltas: list[Affine | InputScale] = []
        for target, names in placed:
            vector = artifact.tensors[names.name(_VECTOR)].float().flatten()
            if _rescales_input(names):
                deltas.extend(InputScale(part.site, vector) for part in target.parts)
            else:
                parts = zip(target.parts, target.split(vector), strict=True)
                deltas.extend(Affine(part.site, scale, None) for part, scale in parts)
        return LoweredAdapter(artifact.digest, (*deltas, *saved.lower(artifact.tensors, base)))


def _place(
    candidate: Candidate, base: BaseDescription
) -> tuple[list[tuple[Target, ModuleTensors]], SavedModules]:
    """Each module's vector and the linears that it fits, ordered by site."""
    check_fields(candidate.config, _FIELDS)
    saved = find_saved_modules(candidate.config, candidate.shapes, base)
    modules = group_tensors(saved.others(candidate.shapes), (_VECTOR,))
    misfits = [found for tensors in modules if (found := _find_misfit(tensors, base)) is not None]
    raise_misfits(misfits, modules, base, candidate.base_model)
    saved.check_modules({tensors.module for tensors in modules}, base)
    placed = [(target, each) for each in modules if (target := find_target(each.module, base)) is not None]
    for target, tensors in placed:
        if target.is_head:
            raise AdapterUnsupportedError(tensors.name(_VECTOR), "rescales the head, which is not served")
        _check_placement(tensors, candidate.config.get("feedforward_modules"))
    return sorted(placed, key=lambda pair: pair[0].parts[0].site), saved


def _rescales_input(tensors: ModuleTensors) -> bool:
    """PEFT stores factors of outputs as a column, of inputs as a row."""
    return tensors.shapes[_VECTOR][0] == 1 and tensors.shapes[_VECTOR][-1] != 1


def _find_misfit(tensors: ModuleTensors, base: BaseDescription) -> Misfit | None:
    target = find_target(tensors.module, base)
    if target is None:
        return missing_module(tensors, base)
    if len(tensors.shapes[_VECTOR]) == 2 and _rescales_input(tensors):
        return find_misfit(tensors, _VECTOR, (1, target.d_in))
    return find_misfit(tensors, _VECTOR, (target.d_out, 1))


def _check_placement(tensors: ModuleTensors, names: Any) -> None:
    """A list of feed-forward modules must agree with the shape; a regex is left alone."""
    if not isinstance(names, list):
        if not isinstance(names, str | None):
            raise AdapterInvalidError("feedforward_modules", "must be a list of module names, or a pattern")
        return
    if not all(isinstance(name, str) for name in names):
        raise AdapterInvalidError("feedforward_modules", "must be a list of module names")
    if any(tensors.module.endswith(name) for name in names) != _rescales_input(tensors):
        raise AdapterInvalidError(
            tensors.name(_VECTOR),
            f"has shape {list(tensors.shapes[_VECTOR])}, which contradicts feedforward_modules",
        )


@dataclass(frozen=True, slots=True)
class AdapterHubIa3Method(OnAnyBase):
    """IA3 from an AdapterHub directory: each adapted linear's *output*, bias included, becomes ``y ⊙ (alpha · l)``.

    PEFT's IA3 rescales the *input* of feed-forward modules instead; here every module is treated alike. On Llama the
    default adapts k, v and down_proj, on BERT k, v and what feeds the activation. A gate, where there is one, stands in
    place of alpha.
    """

    @property
    def method(self) -> AdapterMethod:
        """IA3."""
        return AdapterMethod.IA3

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: every tensor must be used and fit."""
        config, name = _read_config(candidate.config, base)
        names = plain_names(candidate.shapes, base)
        for module, plain in _vectors(config, name, names, base):
            _check_shape(names, plain, candidate.shapes, base.linears[module.site.name][1])
            check_gate(module, names, candidate.shapes, base)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """One ``Affine`` per linear, ordered by site; vectors are float32."""
        config, name = _read_config(artifact.config, base)
        names = plain_names(artifact.tensors, base)
        shapes = {tensor: tuple(value.shape) for tensor, value in artifact.tensors.items()}
        deltas = []
        for module, plain in _vectors(config, name, names, base):
            _check_shape(names, plain, shapes, base.linears[module.site.name][1])
            check_gate(module, names, shapes, base)
            gate = None if module.gate is None else pick_gate(names, artifact.tensors, module.gate)
            (vector,) = module.split(names.pick(artifact.tensors, plain).float().reshape(-1))
            scale = vector * config.alpha if gate is None else vector
            deltas.append(Affine(module.site, scale, None, gate))
        return LoweredAdapter(digest=artifact.digest, deltas=tuple(deltas))


def _read_config(config: Mapping[str, Any], base: BaseDescription) -> tuple[LorasConfig, str]:
    parsed, name = read_config(config, base)
    if parsed.rank != 1:
        raise AdapterInvalidError("r", f"is {parsed.rank}; with composition_mode 'scale' it must be 1")
    return parsed, name


def _vectors(
    config: LorasConfig, name: str, names: TensorNames, base: BaseDescription
) -> list[tuple[AdaptedModule, str]]:
    """Each adapted linear, and the plain name of its vector."""
    vectors = []
    for module in find_modules(config, name, names, base):
        tensor = names.names(next(iter(module.parts.values())))[0]
        if "lora_A" in module.parts:
            tensor = names.names(module.parts["lora_A"])[0]
            raise AdapterInvalidError(tensor, "is not part of IA3, which has only the vector lora_B")
        if module.is_merged:
            raise AdapterUnsupportedError(
                tensor, "rescales a module that computes queries, keys and values, which is not served"
            )
        vectors.append((module, module.parts["lora_B"]))
    return vectors


def _check_shape(names: TensorNames, plain: str, shapes: Mapping[str, tuple[int, ...]], d_out: int) -> None:
    for tensor in names.names(plain):
        if shapes[tensor] != (d_out, 1):
            raise AdapterInvalidError(tensor, f"has shape {list(shapes[tensor])}; expected {[d_out, 1]}")
