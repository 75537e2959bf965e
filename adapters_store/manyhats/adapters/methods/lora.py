"""LoRA: a low-rank update of any linear, of the embedding or of the head, as PEFT and AdapterHub save it.

To a linear's output it adds ``scale · ((x Aᵀ) Bᵀ + bias)``, A [R, d_in] and B [d_out, R]; the bias is B's own, if
PEFT's ``lora_bias`` is set. To the embedding of a token, before any multiplier of the architecture, it adds ``scale ·
A[:, id]ᵀ Bᵀ``, A [R, V] and B [D, R]. The scale is ``lora_tensors.lora_scale``.

In mixtures of experts it acts on routers, and on experts' linears: each in a module of its own, or all of a layer in
one whose parameters ``target_parameters`` names.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; rank-stabilised scale: Kalajdzievski 2023 (arXiv:2312.03732).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, shown
from manyhats.adapters.formats.adapterhub.loras import (
    AdaptedModule,
    check_gate,
    find_modules,
    read_config,
)
from manyhats.adapters.formats.adapterhub.tensors import (
    TensorNames,
    full_path,
    pick_gate,
    plain_name,
    plain_names,
)
from manyhats.adapters.formats.peft.lora_config import parse_lora_config
from manyhats.adapters.formats.peft.lora_tensors import (
    BIAS,
    EMBEDDING_A,
    EMBEDDING_B,
    A,
    B,
    EmbeddingPlacement,
    ExpertsPlacement,
    LinearPlacement,
    LoraPlacements,
    check_parameters,
    place_lora,
)
from manyhats.adapters.formats.peft.module_selection import check_selected, is_tying_ensured
from manyhats.adapters.formats.peft.saved_modules import SavedModules, find_saved_modules
from manyhats.adapters.formats.peft.tensors import candidate_of
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate, OnAnyBase
from manyhats.adapters.primitives import Affine, Delta, EmbeddingLowRank, LoweredAdapter, LowRank
from manyhats.adapters.sites import BaseDescription, Site, expert_linear


@dataclass(frozen=True, slots=True)
class LoraMethod(OnAnyBase):
    """LoRA from a PEFT directory; its tensors say which modules it acts on, and its config must not say otherwise."""

    @property
    def method(self) -> AdapterMethod:
        """LORA."""
        return AdapterMethod.LORA

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: every tensor must be used, fit, and keep to the limits."""
        check_lora(candidate, base, limits)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """One ``LowRank`` per linear, ordered by site; the matrices keep their stored dtype."""
        placements, saved = place_artifact(artifact, base)
        tensors = artifact.tensors
        deltas = [delta for each in placements.linears for delta in _lower_linear(each, tensors)]
        deltas += [delta for each in placements.experts for delta in _lower_experts(each, tensors, base)]
        if placements.embedding is not None:
            deltas.append(_lower_embedding(placements.embedding, tensors))
        return LoweredAdapter(artifact.digest, (*deltas, *saved.lower(tensors, base)))


def check_lora(candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
    """``check`` for LoRA and the methods that extend it."""
    config = parse_lora_config(candidate.config)
    rank = config.rank
    if rank > limits.max_rank:
        raise AdapterTooLargeError("r", f"is {rank}; the limit is {limits.max_rank}")
    placements, _ = place(candidate, base)
    placements.check_ranks(limits)
    check_parameters(config, base)
    modules = [each for each in placements.modules if not config.selects_parameter(f"{each.module}.weight")]
    check_selected(candidate.config, modules, base)


def place(candidate: Candidate, base: BaseDescription) -> tuple[LoraPlacements, SavedModules]:
    """Where each tensor of a candidate belongs.

    Raises:
        ArtifactError, BaseMismatchError: as ``place_lora`` and ``find_saved_modules``.
    """
    config = parse_lora_config(candidate.config)
    saved = find_saved_modules(candidate.config, candidate.shapes, base)
    placements = place_lora(config, candidate.shapes, saved, base, candidate.base_model)
    if is_tying_ensured(candidate.config, base):
        placements.check_tying(base)
    return placements, saved


def place_artifact(artifact: AdapterArtifact, base: BaseDescription) -> tuple[LoraPlacements, SavedModules]:
    """``place``, of an artifact in memory."""
    return place(candidate_of(artifact), base)


def _lower_linear(placement: LinearPlacement, tensors: Mapping[str, Tensor]) -> Iterator[Delta]:
    """A fused module's parts share A; each has its own rows of B."""
    target, names = placement.target, placement.tensors
    a, scale = tensors[names.name(A)], placement.scale
    for part, b in zip(target.parts, target.split(tensors[names.name(B)]), strict=True):
        yield LowRank(part.site, a, b, scale)
    if BIAS in names.shapes:
        offsets = target.split(tensors[names.name(BIAS)].float() * scale)
        for part, offset in zip(target.parts, offsets, strict=True):
            yield Affine(part.site, scale=None, offset=offset)


def _lower_experts(
    placement: ExpertsPlacement, tensors: Mapping[str, Tensor], base: BaseDescription
) -> Iterator[Delta]:
    """Each expert's own rows of A and columns of B; its linears share A, and have their rows of B."""
    names, num = placement.tensors, placement.stack.num
    all_a = tensors[names.name(A)].unflatten(0, (num, placement.rank))
    all_b = tensors[names.name(B)].unflatten(1, (placement.rank, num))
    sizes = [base.linears[expert_linear(0, name)][1] for name in placement.linears]
    for expert in range(num):
        for name, b in zip(placement.linears, all_b[:, :, expert].split(sizes), strict=True):
            site = Site(placement.stack.layer, expert_linear(expert, name))
            yield LowRank(site, all_a[expert], b, placement.scale)


def _lower_embedding(placement: EmbeddingPlacement, tensors: Mapping[str, Tensor]) -> EmbeddingLowRank:
    names = placement.tensors
    a, b = tensors[names.name(EMBEDDING_A)], tensors[names.name(EMBEDDING_B)]
    return EmbeddingLowRank(a.T, b, placement.scale)


@dataclass(frozen=True, slots=True)
class AdapterHubLoraMethod(OnAnyBase):
    """LoRA from an AdapterHub directory: ``y += alpha / R · (x Aᵀ) Bᵀ``, on the linears that the tensors name.

    On Llama the library calls down_proj *intermediate* and up_proj *output*, elsewhere the other way round, so the
    tensors' names decide. Versions before 1.1 did not scale at all. GPT-2's queries, keys and values are one module,
    with the LoRAs of those that the config names below each other: A [n · R, d_in] and B [n · d_out, R]. A gate, where
    there is one, stands in place of alpha / R.
    """

    @property
    def method(self) -> AdapterMethod:
        """LORA."""
        return AdapterMethod.LORA

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: every tensor must be used, fit, and keep to the limits."""
        config, name = read_config(candidate.config, base)
        if config.rank > limits.max_rank:
            raise AdapterTooLargeError("r", f"is {config.rank}; the limit is {limits.max_rank}")
        names = plain_names(candidate.shapes, base)
        for module in find_modules(config, name, names, base):
            _check_pair(module, config.rank, names, candidate.shapes, base)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """One ``LowRank`` per linear, ordered by site; the matrices keep their stored dtype."""
        config, name = read_config(artifact.config, base)
        names = plain_names(artifact.tensors, base)
        shapes = {tensor: tuple(value.shape) for tensor, value in artifact.tensors.items()}
        deltas = []
        for module in find_modules(config, name, names, base):
            _check_pair(module, config.rank, names, shapes, base)
            a, b = (names.pick(artifact.tensors, module.parts[part]) for part in ("lora_A", "lora_B"))
            gate = None if module.gate is None else pick_gate(names, artifact.tensors, module.gate)
            scale = config.alpha / config.rank if gate is None else 1.0
            deltas += [
                LowRank(linear.site, own_a, own_b, scale, gate)
                for linear, own_a, own_b in zip(
                    module.linears, a.split(config.rank), module.split(b), strict=True
                )
            ]
        return LoweredAdapter(digest=artifact.digest, deltas=tuple(deltas))


def _check_pair(
    module: AdaptedModule,
    rank: int,
    names: TensorNames,
    shapes: Mapping[str, tuple[int, ...]],
    base: BaseDescription,
) -> None:
    d_in, count = base.linears[module.site.name][0], len(module.linears)
    d_out = sum(base.linears[linear.site.name][1] for linear in module.linears)
    present = names.names(next(iter(module.parts.values())))[0]
    check_gate(module, names, shapes, base)
    for part, expected in (("lora_A", (count * rank, d_in)), ("lora_B", (d_out, rank))):
        if part not in module.parts:
            path = full_path(base, plain_name(base, present).rpartition(".")[0])
            raise AdapterInvalidError(present, f"its partner {shown(f'{path}.{part}')} is missing")
        for tensor in names.names(module.parts[part]):
            if shapes[tensor] != expected:
                raise AdapterInvalidError(
                    tensor, f"has shape {list(shapes[tensor])}; expected {list(expected)}"
                )
