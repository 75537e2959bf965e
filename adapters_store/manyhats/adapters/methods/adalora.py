"""AdaLoRA: a low-rank update by singular values, some of which training removed, as PEFT saves it.

To a linear's output it adds ``scale · (x (e ⊙ A)ᵀ) Bᵀ``: A [R, d_in] and B [d_out, R] are the right and left singular
vectors, e [R, 1] the singular values, and the scale is ``adalora_scale``.

Source: Zhang et al. 2023 (arXiv:2303.10512), equation 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError
from manyhats.adapters.formats.peft.fields import check_bias_field, check_fields, parse_alpha, parse_rank
from manyhats.adapters.formats.peft.lora_config import (
    DEFAULT_ALPHA,
    LORA_FIELDS,
    LORA_REFUSED,
    TARGET_PARAMETERS,
    check_initialisation,
)
from manyhats.adapters.formats.peft.module_selection import check_selected
from manyhats.adapters.formats.peft.saved_modules import SavedModules, find_saved_modules
from manyhats.adapters.formats.peft.tensors import (
    Misfit,
    ModuleTensors,
    Target,
    candidate_of,
    check_finite,
    find_misfit,
    find_target,
    group_tensors,
    missing_module,
    raise_misfits,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate, OnAnyBase
from manyhats.adapters.primitives import LoweredAdapter, LowRank
from manyhats.adapters.sites import BaseDescription

_A, _B, _E = "lora_A", "lora_B", "lora_E"
_DEFAULT_INITIAL_RANK = 12
# PEFT's guard against a division by zero; it is in every scale.
_EPSILON = 1e-5

# These include LoRA's fields that AdaLoRA's layers do not read; the others are its schedule.
_FIELDS = (LORA_FIELDS - {"use_dora", "lora_bias", TARGET_PARAMETERS}) | {
    "beta1",
    "beta2",
    "deltaT",
    "init_r",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
}
_REFUSED = LORA_REFUSED | {
    "use_dora": "DoRA with AdaLoRA",
    "lora_bias": "a bias of lora_B with AdaLoRA",
    TARGET_PARAMETERS: "AdaLoRA on experts",
}


def adalora_scale(alpha: float, initial_rank: int) -> float:
    """The scale of every update, alpha / (initial rank + 1e-5), however many singular values are left."""
    return alpha / (initial_rank + _EPSILON)


@dataclass(frozen=True, slots=True)
class _Config:
    """The part of the config that determines the maths; ``ranks`` are those left after training, by module path."""

    alpha: float
    initial_rank: int
    ranks: Mapping[str, int]

    @property
    def scale(self) -> float:
        return adalora_scale(self.alpha, self.initial_rank)

    def rank_of(self, module: str) -> int:
        return self.ranks.get(module, self.initial_rank)


@dataclass(frozen=True, slots=True)
class AdaLoraMethod(OnAnyBase):
    """AdaLoRA from a PEFT directory; modules that training left without singular values add nothing."""

    @property
    def method(self) -> AdapterMethod:
        """ADALORA."""
        return AdapterMethod.ADALORA

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: every tensor must be used, fit, and keep to the limits."""
        config = _parse_config(candidate.config)
        placed, _ = _place(config, candidate, base)
        check_selected(candidate.config, [tensors for _, tensors in placed], base)
        for _, tensors in placed:
            rank = config.rank_of(tensors.module)
            if rank > limits.max_rank:
                raise AdapterTooLargeError(
                    tensors.name(_A), f"has rank {rank}; the limit is {limits.max_rank}"
                )

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """One ``LowRank`` per linear, A holding the singular values, float32."""
        config = _parse_config(artifact.config)
        placed, saved = _place(config, candidate_of(artifact), base)
        deltas = [
            delta
            for target, tensors in placed
            if config.rank_of(tensors.module) > 0
            for delta in _lower_module(target, tensors, artifact.tensors, config.scale)
        ]
        return LoweredAdapter(artifact.digest, (*deltas, *saved.lower(artifact.tensors, base)))


def _lower_module(
    target: Target, names: ModuleTensors, tensors: Mapping[str, Tensor], scale: float
) -> list[LowRank]:
    scaled = tensors[names.name(_A)].float() * tensors[names.name(_E)].float()
    a = check_finite(names.name(_E), scaled)
    parts = zip(target.parts, target.split(tensors[names.name(_B)].float()), strict=True)
    return [LowRank(part.site, a, b, scale) for part, b in parts]


def _place(
    config: _Config, candidate: Candidate, base: BaseDescription
) -> tuple[list[tuple[Target, ModuleTensors]], SavedModules]:
    """Each module's tensors and the linears that they fit, ordered by site."""
    saved = find_saved_modules(candidate.config, candidate.shapes, base)
    modules = group_tensors(saved.others(candidate.shapes), (_A, _B, _E))
    for tensors in modules:
        tensors.require((_A, _B, _E))
    misfits = [found for tensors in modules if (found := _find_misfit(tensors, config, base)) is not None]
    raise_misfits(misfits, modules, base, candidate.base_model)
    saved.check_modules({tensors.module for tensors in modules}, base)
    placed = [(target, each) for each in modules if (target := find_target(each.module, base)) is not None]
    return sorted(placed, key=lambda pair: pair[0].parts[0].site), saved


def _find_misfit(tensors: ModuleTensors, config: _Config, base: BaseDescription) -> Misfit | None:
    target = find_target(tensors.module, base)
    if target is None:
        return missing_module(tensors, base)
    rank = config.rank_of(tensors.module)
    expected: Mapping[str, Sequence[int]] = {_A: (rank, target.d_in), _B: (target.d_out, rank), _E: (rank, 1)}
    found = (find_misfit(tensors, suffix, shape) for suffix, shape in expected.items())
    return next((misfit for misfit in found if misfit is not None), None)


def _parse_config(config: Mapping[str, Any]) -> _Config:
    """Read a PEFT AdaLoRA config; ``r``, ``alpha_pattern`` and ``use_rslora`` mean nothing in it."""
    check_fields(config, _FIELDS, _REFUSED)
    check_initialisation(config.get("init_lora_weights"))
    check_bias_field(config, "lora_only")
    alpha = parse_alpha("lora_alpha", config.get("lora_alpha", DEFAULT_ALPHA))
    if alpha <= 0:
        raise AdapterInvalidError("lora_alpha", "must be above 0")
    rank = parse_rank("init_r", config.get("init_r", _DEFAULT_INITIAL_RANK))
    return _Config(alpha, rank, _parse_rank_pattern(config.get("rank_pattern"), rank))


def _parse_rank_pattern(value: Any, initial_rank: int) -> dict[str, int]:
    """Module path → how many of its singular values are kept; keys are the names of ``lora_E``."""
    if not isinstance(value, dict | None):
        raise AdapterInvalidError("rank_pattern", "must be a map of tensor names to lists of flags")
    ranks: dict[str, int] = {}
    for name, kept in (value or {}).items():
        is_mask = isinstance(kept, list) and all(isinstance(flag, bool) for flag in kept)
        if not is_mask or len(kept) != initial_rank:
            raise AdapterInvalidError("rank_pattern", f"must hold {initial_rank} flags per tensor")
        ranks[name.partition(f".{_E}")[0]] = sum(kept)
    return ranks
