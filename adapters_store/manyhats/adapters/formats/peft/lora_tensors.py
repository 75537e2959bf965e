"""Where a LoRA file's tensors belong: linears, embedding, head; shapes, ranks and scales checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, AdapterUnsupportedError
from manyhats.adapters.formats.peft.lora_config import LoraConfig
from manyhats.adapters.formats.peft.saved_modules import SavedModules
from manyhats.adapters.formats.peft.tensors import (
    Misfit,
    ModuleTensors,
    Shape,
    Target,
    find_misfit,
    find_target,
    group_tensors,
    is_embedding,
    missing_module,
    raise_misfits,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.sites import EMBEDDING, HEAD, BaseDescription

A = "lora_A.weight"
B = "lora_B.weight"
BIAS = "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"
EMBEDDING_A = "lora_embedding_A"
EMBEDDING_B = "lora_embedding_B"


@dataclass(frozen=True, slots=True)
class LinearPlacement:
    """The tensors of one module, and the linears that they fit."""

    target: Target
    tensors: ModuleTensors
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class EmbeddingPlacement:
    """The tensors of the embedding."""

    tensors: ModuleTensors
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class LoraPlacements:
    """All of a file's tensors but those of ``SavedModules``; linears are ordered by site."""

    linears: tuple[LinearPlacement, ...]
    embedding: EmbeddingPlacement | None

    @property
    def modules(self) -> tuple[ModuleTensors, ...]:
        """The tensors of each module."""
        linears = tuple(placement.tensors for placement in self.linears)
        return linears if self.embedding is None else (*linears, self.embedding.tensors)

    def check_ranks(self, limits: AdapterLimits) -> None:
        """Check every rank against the limit.

        Raises:
            AdapterTooLargeError: names a tensor.
        """
        for placement in self.linears:
            _check_rank(placement.tensors.name(A), placement.rank, limits)
        if self.embedding is not None:
            _check_rank(self.embedding.tensors.name(EMBEDDING_A), self.embedding.rank, limits)


def _check_rank(name: str, rank: int, limits: AdapterLimits) -> None:
    if rank > limits.max_rank:
        raise AdapterTooLargeError(name, f"has rank {rank}; the limit is {limits.max_rank}")


def lora_scale(alpha: float, rank: int, *, is_rank_stabilised: bool = False) -> float:
    """The scale of a low-rank update: alpha / R, or alpha / √R if it is rank-stabilised.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; Kalajdzievski 2023 (arXiv:2312.03732), section 3.
    """
    return alpha / (math.sqrt(rank) if is_rank_stabilised else rank)


def place_lora(
    config: LoraConfig,
    shapes: Mapping[str, Shape],
    saved: SavedModules,
    base: BaseDescription,
    base_model: str,
) -> LoraPlacements:
    """Find where each tensor belongs.

    Raises:
        ArtifactError: a tensor is left over, lacks its partner, or contradicts the config.
        BaseMismatchError: the tensors fit another base.
    """
    modules = group_tensors(saved.others(shapes), (A, B, BIAS, MAGNITUDE, EMBEDDING_A, EMBEDDING_B))
    for tensors in modules:
        tensors.require(_expected_suffixes(tensors, config, base))
    misfits = [misfit for tensors in modules if (misfit := _find_misfit(tensors, base)) is not None]
    raise_misfits(misfits, modules, base, base_model)
    saved.check_modules({tensors.module for tensors in modules}, base)
    _check_tying(modules, config, base)
    linears: list[LinearPlacement] = []
    embedding = None
    for tensors in modules:
        target = find_target(tensors.module, base)
        if target is not None:
            linears.append(LinearPlacement(target, tensors, *_rank_and_scale(tensors, A, B, config)))
        else:
            found = _rank_and_scale(tensors, EMBEDDING_A, EMBEDDING_B, config)
            embedding = EmbeddingPlacement(tensors, *found)
    return LoraPlacements(tuple(sorted(linears, key=lambda each: each.target.parts[0].site)), embedding)


def _expected_suffixes(tensors: ModuleTensors, config: LoraConfig, base: BaseDescription) -> set[str]:
    target = find_target(tensors.module, base)
    if is_embedding(tensors.module, base):
        if config.use_dora:
            raise AdapterUnsupportedError(tensors.any_name, "is part of DoRA on the embedding")
        expected = {EMBEDDING_A, EMBEDDING_B}
    else:
        expected = {A, B}
        if config.lora_bias:
            expected.add(BIAS)
        if config.use_dora:
            expected.add(MAGNITUDE)
    if target is not None and target.is_head and (config.use_dora or config.lora_bias):
        raise AdapterUnsupportedError(
            tensors.any_name, "is part of DoRA or lora_bias on the head; only plain LoRA is served there"
        )
    return expected


def _find_misfit(tensors: ModuleTensors, base: BaseDescription) -> Misfit | None:
    """The tensor of a module that does not fit the base; None if all do."""
    target = find_target(tensors.module, base)
    if is_embedding(tensors.module, base):
        expected: dict[str, Sequence[int | str]] = {
            EMBEDDING_A: ("rank", base.vocab_size),
            EMBEDDING_B: (base.embedding_size, "rank"),
        }
    elif target is None:
        return missing_module(tensors)
    else:
        d_out = target.d_out
        expected = {A: ("rank", target.d_in), B: (d_out, "rank"), BIAS: (d_out,), MAGNITUDE: (d_out,)}
    found = (find_misfit(tensors, suffix, expected[suffix]) for suffix in sorted(tensors.shapes))
    return next((misfit for misfit in found if misfit is not None), None)


def _rank_and_scale(tensors: ModuleTensors, a: str, b: str, config: LoraConfig) -> tuple[int, float]:
    """Check the ranks of a pair that fits its module, and compute its scale."""
    rank, b_shape = tensors.shapes[a][0], tensors.shapes[b]
    if rank == 0:
        raise AdapterInvalidError(tensors.name(a), "has rank 0")
    if b_shape[1] != rank:
        raise AdapterInvalidError(
            tensors.name(b),
            f"has shape {list(b_shape)}; expected [{b_shape[0]}, {rank}] to match its partner",
        )
    expected = config.rank_of(tensors.module)
    if rank != expected:
        raise AdapterInvalidError(tensors.name(a), f"has rank {rank}; the config says {expected}")
    alpha = config.alpha_of(tensors.module)
    return rank, lora_scale(alpha, rank, is_rank_stabilised=config.use_rslora)


def _check_tying(modules: Sequence[ModuleTensors], config: LoraConfig, base: BaseDescription) -> None:
    """If embedding and head are adapted as one, both must have their tensors."""
    ends = {base.path_of(EMBEDDING), base.path_of(HEAD)}
    adapted = {base.module_of(tensors.module) for tensors in modules} & ends
    if base.is_tied and config.ensure_weight_tying and len(adapted) == 1:
        raise AdapterInvalidError(
            "ensure_weight_tying", f"asks for LoRA on embedding and head; only {adapted.pop()} has it"
        )
