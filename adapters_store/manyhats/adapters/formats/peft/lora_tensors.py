"""Where a LoRA file's tensors belong: linears, embedding, head; shapes, ranks and scales checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
    shown,
)
from manyhats.adapters.formats.peft.lora_config import TARGET_PARAMETERS, LoraConfig
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
from manyhats.adapters.sites import EMBEDDING, HEAD, ROUTER, BaseDescription, ExpertStack, expert_linear

A = "lora_A.weight"
B = "lora_B.weight"
BIAS = "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"
EMBEDDING_A = "lora_embedding_A"
EMBEDDING_B = "lora_embedding_B"
_INNER = ".base_layer"


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
class ExpertsPlacement:
    """The tensors of one parameter of a stack of experts.

    Attributes:
        stack: the experts.
        linears: of each expert, one below the other in the parameter.
        tensors: A [E · R, d_in], expert by expert, and B [d_out, R · E], in which neighbours are of different experts.
        rank: R, of each expert.
        scale: of all of them.
    """

    stack: ExpertStack
    linears: tuple[str, ...]
    tensors: ModuleTensors
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class LoraPlacements:
    """All of a file's tensors but those of ``SavedModules``; linears are ordered by site, experts by layer."""

    linears: tuple[LinearPlacement, ...]
    embedding: EmbeddingPlacement | None
    experts: tuple[ExpertsPlacement, ...] = ()

    @property
    def modules(self) -> tuple[ModuleTensors, ...]:
        """The tensors of each module, but for stacks of experts."""
        linears = tuple(placement.tensors for placement in self.linears)
        return linears if self.embedding is None else (*linears, self.embedding.tensors)

    def check_tying(self, base: BaseDescription) -> None:
        """Check that embedding and head, adapted as one, both have their tensors, if either has.

        Raises:
            AdapterInvalidError: only one has.
        """
        ends = {base.path_of(EMBEDDING), base.path_of(HEAD)}
        adapted = {base.module_of(tensors.module) for tensors in self.modules} & ends
        if len(adapted) == 1:
            raise AdapterInvalidError(
                "ensure_weight_tying", f"asks for LoRA on embedding and head; only {adapted.pop()} has it"
            )

    def check_ranks(self, limits: AdapterLimits) -> None:
        """Check every rank against the limit.

        Raises:
            AdapterTooLargeError: names a tensor.
        """
        for placement in self.linears:
            _check_rank(placement.tensors.name(A), placement.rank, limits)
        for experts in self.experts:
            _check_rank(experts.tensors.name(A), experts.rank, limits)
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
    grouped = group_tensors(saved.others(shapes), (A, B, BIAS, MAGNITUDE, EMBEDDING_A, EMBEDDING_B))
    experts, modules = place_experts(grouped, config, base)
    targets = [find_target(tensors.module, base, in_mixtures=True) for tensors in modules]
    found = list(zip(modules, targets, strict=True))
    for tensors, target in found:
        if target is not None or is_embedding(tensors.module, base):
            tensors.require(_expected_suffixes(tensors, target, config, base))
    misfits = [misfit for each in found if (misfit := _find_misfit(*each, base)) is not None]
    raise_misfits(misfits, modules, base, base_model)
    saved.check_modules({tensors.module for tensors in modules}, base)
    linears: list[LinearPlacement] = []
    embedding = None
    for tensors, target in found:
        if target is not None:
            linears.append(LinearPlacement(target, tensors, *_rank_and_scale(tensors, A, B, config)))
        else:
            rank, scale = _rank_and_scale(tensors, EMBEDDING_A, EMBEDDING_B, config)
            embedding = EmbeddingPlacement(tensors, rank, scale)
    linears.sort(key=lambda each: each.target.parts[0].site)
    return LoraPlacements(tuple(linears), embedding, experts)


def _expected_suffixes(
    tensors: ModuleTensors, target: Target | None, config: LoraConfig, base: BaseDescription
) -> set[str]:
    if target is None and is_embedding(tensors.module, base):
        if config.use_dora:
            raise AdapterUnsupportedError(tensors.any_name, "is part of DoRA on the embedding")
        expected = {EMBEDDING_A, EMBEDDING_B}
    else:
        expected = {A, B}
        if config.lora_bias:
            expected.add(BIAS)
        if config.use_dora:
            expected.add(MAGNITUDE)
    is_plain = not (config.use_dora or config.lora_bias)
    if target is not None and not is_plain and (target.is_head or target.parts[0].site.is_of_mixture):
        place = "the head" if target.is_head else "a router or an expert"
        raise AdapterUnsupportedError(
            tensors.any_name, f"is part of DoRA or lora_bias on {place}; only plain LoRA is served there"
        )
    return expected


def _find_misfit(tensors: ModuleTensors, target: Target | None, base: BaseDescription) -> Misfit | None:
    """The tensor of a module that does not fit the base; None if all do."""
    if target is None and is_embedding(tensors.module, base):
        expected: dict[str, Sequence[int | str]] = {
            EMBEDDING_A: ("rank", base.vocab_size),
            EMBEDDING_B: (base.embedding_size, "rank"),
        }
    elif target is None:
        return missing_module(tensors, base)
    else:
        d_out = target.d_out
        expected = {A: ("rank", target.d_in), B: (d_out, "rank"), BIAS: (d_out,), MAGNITUDE: (d_out,)}
    found = (find_misfit(tensors, suffix, expected[suffix]) for suffix in sorted(tensors.shapes))
    return next((misfit for misfit in found if misfit is not None), None)


def place_experts(
    grouped: Sequence[ModuleTensors], config: LoraConfig, base: BaseDescription
) -> tuple[tuple[ExpertsPlacement, ...], list[ModuleTensors]]:
    """Those of the tensors that act on stacks of experts, and the others.

    PEFT wraps a module once for each of its parameters that ``target_parameters`` selects, in the module's order: the
    last has the module's own name, and each one before has another ``base_layer`` behind it.
    """
    wrappers: dict[str, tuple[ExpertStack, str]] = {}
    for path, stack in base.stacks.items():
        chosen = [name for name in stack.parameters if config.selects_parameter(f"{path}.{name}")]
        for depth, name in enumerate(reversed(chosen)):
            wrappers[f"{path}{_INNER * depth}"] = stack, name
    placed, others = [], []
    for tensors in grouped:
        own = base.stack_of(tensors.module.removesuffix(_INNER))
        wrapper = f"{own}{_INNER if tensors.module.endswith(_INNER) else ''}"
        if wrapper in wrappers:
            placed.append(_place_stack(tensors, *wrappers[wrapper], config, base))
        elif own is not None:
            raise AdapterInvalidError(
                tensors.any_name,
                f"acts on {tensors.module}, which {TARGET_PARAMETERS} leaves out; PEFT would not use it",
            )
        else:
            others.append(tensors)
    return tuple(placed), others


def check_parameters(config: LoraConfig, base: BaseDescription) -> None:
    """Check that ``target_parameters`` names nothing but parameters of experts, and routers' weights.

    Raises:
        AdapterUnsupportedError: it does, which PEFT may take as another layout.
    """
    routers = {path for path, parts in base.modules.items() if parts[0].site.name == ROUTER}
    others = {other for other, path in base.aliases.items() if path in routers}
    known = {f"{path}.weight" for path in routers | others}
    known |= {f"{path}.{name}" for path, stack in base.stacks.items() for name in stack.parameters}
    for name in config.target_parameters:
        if not any(path == name or path.endswith(f".{name}") for path in known):
            raise AdapterUnsupportedError(
                TARGET_PARAMETERS, f"names {shown(name)}, which is no parameter of experts on this base"
            )


def _place_stack(
    tensors: ModuleTensors, stack: ExpertStack, parameter: str, config: LoraConfig, base: BaseDescription
) -> ExpertsPlacement:
    """The tensors of one parameter, A [R · E, d_in] and B [d_out, R · E]."""
    if config.use_dora or config.lora_bias:
        raise AdapterUnsupportedError(
            tensors.any_name, "is part of DoRA or lora_bias on experts; only plain LoRA is served there"
        )
    tensors.require((A, B))
    linears = stack.parameters[parameter]
    sizes = [base.linears[expert_linear(0, name)] for name in linears]
    expected: dict[str, Sequence[int | str]] = {
        A: ("rank", sizes[0][0]),
        B: (sum(d_out for _, d_out in sizes), "rank"),
    }
    for suffix, shape in expected.items():
        misfit = find_misfit(tensors, suffix, shape)
        if misfit is not None:
            raise AdapterInvalidError(misfit.tensor, misfit.description)
    module = f"{tensors.module.removesuffix(_INNER)}.{parameter}"
    rank, scale = _rank_and_scale(tensors, A, B, config, module, stack.num)
    return ExpertsPlacement(stack, linears, tensors, rank, scale)


def _rank_and_scale(
    tensors: ModuleTensors,
    a: str,
    b: str,
    config: LoraConfig,
    module: str | None = None,
    num_experts: int = 1,
) -> tuple[int, float]:
    """Check the ranks of a pair that fits its module, and compute its scale.

    Args:
        tensors: of the pair.
        a, b: their suffixes.
        config: the artifact's.
        module: what its patterns are matched with; None for the tensors' own.
        num_experts: each has so many.
    """
    rank, b_shape = tensors.shapes[a][0], tensors.shapes[b]
    if rank == 0:
        raise AdapterInvalidError(tensors.name(a), "has rank 0")
    if b_shape[1] != rank:
        raise AdapterInvalidError(
            tensors.name(b),
            f"has shape {list(b_shape)}; expected [{b_shape[0]}, {rank}] to match its partner",
        )
    module = tensors.module if module is None else module
    expected = config.rank_of(module)
    if rank != expected * num_experts:
        each = f" for each of {num_experts} experts" if num_experts > 1 else ""
        raise AdapterInvalidError(tensors.name(a), f"has rank {rank}; the config says {expected}{each}")
    scale = lora_scale(config.alpha_of(module), expected, is_rank_stabilised=config.use_rslora)
    return expected, scale
