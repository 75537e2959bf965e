"""LoRA: a low-rank update of any linear of the decoder, as PEFT saves it (plain, rank-stabilised, mixed).

Source: Hu et al. 2021 (arXiv:2106.09685); rank-stabilised scale: Kalajdzievski 2023 (arXiv:2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.base_name import is_known_name
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
    BaseMismatchError,
    shown,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate
from manyhats.adapters.methods.lora_config import LoraConfig, parse_lora_config
from manyhats.adapters.primitives import LoweredAdapter, LowRank
from manyhats.adapters.sites import BaseDescription, Site

_PREFIX = "base_model.model."
_A = ".lora_A.weight"
_B = ".lora_B.weight"

# What else PEFT saves next to LoRA's matrices: part of the tensor's name → what it is.
_UNSERVED_TENSORS = {
    ".lora_embedding_": "LoRA on an embedding",
    ".lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "lora_bias",
    ".bias": "bias, a trained bias of the base",
    ".lora_E": "AdaLoRA",
    ".lora_diag": "KaSA",
    "trainable_tokens_delta": "trainable_token_indices",
}


def lora_delta(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Low-rank update of a linear's output: ``scale · (x Aᵀ) Bᵀ``.

    Args:
        x: [..., d_in]; the input of the base linear.
        a: [R, d_in]; dtype of x.
        b: [d_out, R]; dtype of x.
        scale: dimensionless; see ``lora_scale``.

    Returns:
        [..., d_out], dtype of x; the caller adds it to the base output.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
    """
    return (x @ a.T) @ b.T * scale


def lora_scale(alpha: float, rank: int, *, is_rank_stabilised: bool = False) -> float:
    """The scale of a low-rank update: alpha / R, or alpha / √R where it is rank-stabilised.

    Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023 (arXiv:2312.03732), section 3.
    """
    return alpha / (math.sqrt(rank) if is_rank_stabilised else rank)


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two matrices of one module; shapes as the file has them."""

    module: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]

    @property
    def a_name(self) -> str:
        return f"{_PREFIX}{self.module}{_A}"

    @property
    def b_name(self) -> str:
        return f"{_PREFIX}{self.module}{_B}"


@dataclass(frozen=True, slots=True)
class _Placement:
    """A pair that fits the base."""

    site: Site
    pair: _Pair
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class LoraMethod:
    """LoRA from a PEFT directory; its tensors say which modules it acts on, never ``target_modules``."""

    @property
    def method(self) -> AdapterMethod:
        """LORA."""
        return AdapterMethod.LORA

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: every tensor must be used, fit, and keep to the limits."""
        config = parse_lora_config(candidate.config)
        if config.rank > limits.max_rank:
            raise AdapterTooLargeError("r", f"is {config.rank}; the limit is {limits.max_rank}")
        for placement in _place(config, candidate.shapes, base, candidate.base_model):
            if placement.rank > limits.max_rank:
                raise AdapterTooLargeError(
                    placement.pair.a_name, f"has rank {placement.rank}; the limit is {limits.max_rank}"
                )

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """One ``LowRank`` per linear, ordered by site; the matrices keep their stored dtype."""
        config = parse_lora_config(artifact.config)
        shapes = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
        deltas = tuple(
            LowRank(
                site=placement.site,
                a=artifact.tensors[placement.pair.a_name],
                b=artifact.tensors[placement.pair.b_name],
                scale=placement.scale,
            )
            for placement in _place(config, shapes, base, artifact.base_model)
        )
        return LoweredAdapter(digest=artifact.digest, deltas=deltas)


def _place(
    config: LoraConfig, shapes: Mapping[str, tuple[int, ...]], base: BaseDescription, base_model: str
) -> list[_Placement]:
    """Find each pair's linear, and check shapes, ranks and scales."""
    pairs = _pair_tensors(shapes)
    _check_fit(pairs, base, base_model)
    placements = [_place_pair(config, pair, base.modules[pair.module]) for pair in pairs]
    return sorted(placements, key=lambda placement: placement.site)


def _pair_tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[_Pair]:
    """Group the tensors by module, ordered by module; every tensor must belong to a pair."""
    modules = {_module_of(name) for name in shapes}
    pairs = []
    for module in sorted(modules):
        a_name, b_name = f"{_PREFIX}{module}{_A}", f"{_PREFIX}{module}{_B}"
        for present, missing in ((a_name, b_name), (b_name, a_name)):
            if missing not in shapes:
                raise AdapterInvalidError(present, f"its partner {shown(missing)} is missing")
        pairs.append(_Pair(module, shapes[a_name], shapes[b_name]))
    return pairs


def _module_of(name: str) -> str:
    """The module that a tensor belongs to, or why the tensor cannot be used."""
    for suffix in (_A, _B):
        if name.startswith(_PREFIX) and name.endswith(suffix):
            return name[len(_PREFIX) : -len(suffix)]
    for part, what in _UNSERVED_TENSORS.items():
        if part in name:
            raise AdapterUnsupportedError(name, f"belongs to {what}, which is not served yet")
    if ".lora_A." in name or ".lora_B." in name:
        raise AdapterInvalidError(
            name, "is not named as PEFT saves it: base_model.model.<module>.lora_A.weight"
        )
    if name.startswith(_PREFIX) and name.endswith(".weight"):
        raise AdapterUnsupportedError(
            name, "is a whole trained weight (modules_to_save), which is not served yet"
        )
    raise AdapterInvalidError(name, "is no tensor of a LoRA adapter; every tensor must be used")


def _check_fit(pairs: Sequence[_Pair], base: BaseDescription, base_model: str) -> None:
    """Every pair must fit a linear of the base.

    If none fits and the artifact does not name this base, it is another base's adapter; else the tensor is at
    fault.
    """
    misfits = [misfit for pair in pairs if (misfit := _find_misfit(pair, base)) is not None]
    if not misfits:
        return
    tensor, description = misfits[0]
    if len(misfits) == len(pairs) > 1 and not is_known_name(base_model, base):
        raise BaseMismatchError(tensor, f"no tensor fits this server's base; this one {description}")
    raise AdapterInvalidError(tensor, description)


def _find_misfit(pair: _Pair, base: BaseDescription) -> tuple[str, str] | None:
    """The tensor of a pair that does not fit, and why; None if both do."""
    site = base.modules.get(pair.module)
    if site is None or site.name not in base.linears:
        if pair.module.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise AdapterUnsupportedError(
                pair.a_name, "adapts the embedding or the head, which is not served yet"
            )
        return pair.a_name, f"acts on {shown(pair.module)}, which is no linear of the base"
    d_in, d_out = base.linears[site.name]
    if len(pair.a_shape) != 2 or pair.a_shape[1] != d_in:
        return pair.a_name, f"has shape {list(pair.a_shape)}; expected [rank, {d_in}]"
    if len(pair.b_shape) != 2 or pair.b_shape[0] != d_out:
        return pair.b_name, f"has shape {list(pair.b_shape)}; expected [{d_out}, rank]"
    return None


def _place_pair(config: LoraConfig, pair: _Pair, site: Site) -> _Placement:
    """Check the ranks of a pair that fits its linear, and give it its scale."""
    rank = pair.a_shape[0]
    if rank == 0:
        raise AdapterInvalidError(pair.a_name, "has rank 0")
    if pair.b_shape[1] != rank:
        raise AdapterInvalidError(
            pair.b_name,
            f"has shape {list(pair.b_shape)}; expected [{pair.b_shape[0]}, {rank}] to fit its lora_A",
        )
    expected = config.rank_of(pair.module)
    if rank != expected:
        raise AdapterInvalidError(pair.a_name, f"has rank {rank}; the config says {expected}")
    scale = lora_scale(config.alpha_of(pair.module), rank, is_rank_stabilised=config.use_rslora)
    return _Placement(site, pair, rank, scale)
