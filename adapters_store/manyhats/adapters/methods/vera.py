"""VeRA: two random projections that all linears share, and two trained vectors for each, as PEFT saves it.

To a linear's output it adds ``λ_b ⊙ (λ_d ⊙ (x A[:, :d_in]ᵀ)) B[:d_out]ᵀ``: A [R, at least d_in] and
B [at least d_out, R] are shared, λ_d [R] and λ_b [d_out] are the linear's own.

Source: Kopiczko et al. 2024 (arXiv:2310.11454), equation 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError
from manyhats.adapters.formats.config_fields import parse_flag
from manyhats.adapters.formats.peft.fields import check_bias_field, check_fields, parse_rank
from manyhats.adapters.formats.peft.module_selection import EXCLUDED, check_selected
from manyhats.adapters.formats.peft.saved_modules import SavedModules, find_saved_modules
from manyhats.adapters.formats.peft.tensors import (
    Misfit,
    ModuleTensors,
    Shape,
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

_B_VECTOR, _D_VECTOR = "vera_lambda_b", "vera_lambda_d"
_SHARED_A, _SHARED_B = "base_model.vera_A", "base_model.vera_B"
_DEFAULT_RANK = 256
_FLOAT32_BYTES = 4
_FIELDS = frozenset(
    (
        "bias",
        "d_initial",
        "init_weights",
        "modules_to_save",
        "projection_prng_key",
        "r",
        "save_projection",
        "vera_dropout",
    )
)


def vera_projections(rank: int, d_in: int, d_out: int, key: int) -> tuple[Tensor, Tensor]:
    """The projections that a file does not hold: A [R, d_in], then B [d_out, R], as PEFT draws them.

    Kaiming-uniform, float32, from torch's CPU generator, whose uniform numbers depend only on the key.
    """
    generator = torch.Generator().manual_seed(key)

    def draw(rows: int, columns: int) -> Tensor:
        # These are PEFT's own steps: another order of roots and products would round differently.
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    a = draw(rank, d_in)
    return a, draw(d_out, rank)


@dataclass(frozen=True, slots=True)
class _Config:
    """The part of the config that determines the maths."""

    rank: int
    key: int
    has_projections: bool


@dataclass(frozen=True, slots=True)
class VeraMethod(OnAnyBase):
    """VeRA from a PEFT directory, with saved projections or those that its key generates."""

    @property
    def method(self) -> AdapterMethod:
        """VERA."""
        return AdapterMethod.VERA

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: every tensor must be used, fit, and keep to the limits."""
        config = _parse_config(candidate.config)
        if config.rank > limits.max_rank:
            raise AdapterTooLargeError("r", f"is {config.rank}; the limit is {limits.max_rank}")
        placed, _ = _place(config, candidate, base)
        check_selected(candidate.config, [names for _, names in placed], base, unread=(EXCLUDED,))
        # A small file may expand to much more: each linear gets its own B.
        size = _FLOAT32_BYTES * config.rank * sum(target.d_out for target, _ in placed)
        if size > limits.max_size_bytes:
            raise AdapterTooLargeError(
                "r", f"makes {size} bytes of matrices; the limit is {limits.max_size_bytes}"
            )

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """One ``LowRank`` per linear, float32.

        Both vectors go into B, so that all linears share the memory of one A.
        """
        config = _parse_config(artifact.config)
        placed, saved = _place(config, candidate_of(artifact), base)
        a, b = _projections(config, placed, artifact.tensors)
        deltas = [
            delta
            for target, names in placed
            for delta in _lower_module(target, names, artifact.tensors, a, b)
        ]
        return LoweredAdapter(artifact.digest, (*deltas, *saved.lower(artifact.tensors, base)))


def _projections(
    config: _Config, placed: Sequence[tuple[Target, ModuleTensors]], tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    if config.has_projections:
        return tensors[_SHARED_A].float(), tensors[_SHARED_B].float()
    return vera_projections(config.rank, *_largest(placed), config.key)


def _lower_module(
    target: Target, names: ModuleTensors, tensors: Mapping[str, Tensor], a: Tensor, b: Tensor
) -> list[LowRank]:
    rows = tensors[names.name(_B_VECTOR)].float().unsqueeze(1)
    columns = tensors[names.name(_D_VECTOR)].float()
    own = check_finite(names.name(_B_VECTOR), rows * b[: target.d_out] * columns)
    parts = zip(target.parts, target.split(own), strict=True)
    return [LowRank(part.site, a[:, : target.d_in], rows_of_b, 1.0) for part, rows_of_b in parts]


def _place(
    config: _Config, candidate: Candidate, base: BaseDescription
) -> tuple[list[tuple[Target, ModuleTensors]], SavedModules]:
    """Each module's tensors and the linears that they fit, ordered by site."""
    saved = find_saved_modules(candidate.config, candidate.shapes, base)
    own = dict(saved.others(candidate.shapes))
    shared = {name: own.pop(name) for name in (_SHARED_A, _SHARED_B) if name in own}
    modules = group_tensors(own, (_B_VECTOR, _D_VECTOR))
    for tensors in modules:
        tensors.require((_B_VECTOR, _D_VECTOR))
    misfits = [found for tensors in modules if (found := _find_misfit(tensors, config, base)) is not None]
    raise_misfits(misfits, modules, base, candidate.base_model)
    saved.check_modules({tensors.module for tensors in modules}, base)
    placed = [(target, each) for each in modules if (target := find_target(each.module, base)) is not None]
    _check_projections(config, shared, placed)
    return sorted(placed, key=lambda pair: pair[0].parts[0].site), saved


def _find_misfit(tensors: ModuleTensors, config: _Config, base: BaseDescription) -> Misfit | None:
    target = find_target(tensors.module, base)
    if target is None:
        return missing_module(tensors, base)
    return find_misfit(tensors, _B_VECTOR, (target.d_out,)) or find_misfit(tensors, _D_VECTOR, (config.rank,))


def _largest(placed: Sequence[tuple[Target, ModuleTensors]]) -> tuple[int, int]:
    """The largest input and output features of any adapted module; PEFT sizes the projections by them."""
    return max((t.d_in for t, _ in placed), default=0), max((t.d_out for t, _ in placed), default=0)


def _check_projections(
    config: _Config, shared: Mapping[str, Shape], placed: Sequence[tuple[Target, ModuleTensors]]
) -> None:
    if not config.has_projections:
        for name in shared:
            raise AdapterInvalidError(name, "is present, although save_projection says it is not")
        return
    d_in, d_out = _largest(placed)
    for name, expected in ((_SHARED_A, (config.rank, d_in)), (_SHARED_B, (d_out, config.rank))):
        if name not in shared:
            raise AdapterInvalidError("save_projection", f"is set, but {name} is missing")
        if shared[name] != expected:
            raise AdapterInvalidError(name, f"has shape {list(shared[name])}; expected {list(expected)}")


def _parse_config(config: Mapping[str, Any]) -> _Config:
    """Read a PEFT VeRA config."""
    check_fields(config, _FIELDS)
    check_bias_field(config, "vera_only")
    key = config.get("projection_prng_key", 0)
    if type(key) is not int or not 0 <= key < 2**63:
        raise AdapterInvalidError("projection_prng_key", "must be a whole number from 0 to 2⁶³ − 1")
    return _Config(
        rank=parse_rank("r", config.get("r", _DEFAULT_RANK)),
        key=key,
        has_projections=parse_flag("save_projection", config.get("save_projection", True)),
    )
