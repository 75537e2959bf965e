"""PEFT's tensor names, and the modules of the base that they belong to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterUnsupportedError,
    BaseMismatchError,
    shown,
)
from manyhats.adapters.formats.base_name import is_known_name
from manyhats.adapters.method import Candidate
from manyhats.adapters.sites import EMBEDDING, HEAD, POOLER, PROJECTION, BaseDescription, Part

PREFIX = "base_model.model."

Shape = tuple[int, ...]

# What PEFT saves for other methods, or for variants: part of the tensor's name → what it is.
_FOREIGN_TENSORS = {
    ".lora_embedding_": "LoRA on an embedding",
    ".lora_magnitude_vector": "DoRA, but the config does not set use_dora",
    ".lora_B.bias": "lora_bias, but the config does not set it",
    ".bias": "bias, a trained bias of the base, which is not served",
    ".lora_E": "AdaLoRA",
    ".lora_diag": "KaSA, which changes the base's weights",
    ".lora_": "LoRA",
    ".vera_": "VeRA",
    ".ia3_": "IA3",
    "trainable_tokens_delta": "trainable_token_indices, but the config does not set them",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A module that an adapter acts on: one linear, or those that a fused module computes.

    Attributes:
        module: its path in the base.
        parts: the linears.
        d_in, d_out: of the whole module.
    """

    module: str
    parts: tuple[Part, ...]
    d_in: int
    d_out: int

    @property
    def is_head(self) -> bool:
        """Whether it is the output head."""
        return self.parts[0].site == HEAD

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """A tensor of the module's output rows ([d_out] or [d_out, n]), part by part."""
        return tuple(
            tensor[part.rows.start : part.rows.stop]
            if isinstance(part.rows, range)
            else tensor[list(part.rows)]
            for part in self.parts
        )


def find_target(module: str, base: BaseDescription, *, in_mixtures: bool = False) -> Target | None:
    """The linear or linears behind a module path; None if the base has none there.

    Args:
        module: its path.
        base: the resident one.
        in_mixtures: whether routers and experts' linears count.
    """
    path = base.module_of(module)
    if path is None:
        return None
    parts = base.modules[path]
    if parts[0].site.is_of_mixture and not in_mixtures:
        return None
    if parts[0].site == HEAD:
        return Target(path, parts, base.embedding_size, base.vocab_size)
    if parts[0].site == POOLER:
        return Target(path, parts, base.hidden_size, base.hidden_size)
    if parts[0].site == PROJECTION:
        return Target(path, parts, base.embedding_size, base.hidden_size)
    if any(part.site.name not in base.linears for part in parts):
        return None
    d_out = sum(base.linears[part.site.name][1] for part in parts)
    return Target(path, parts, base.linears[parts[0].site.name][0], d_out)


def is_embedding(module: str, base: BaseDescription) -> bool:
    """Whether a module path is the embedding's."""
    path = base.module_of(module)
    return path is not None and base.modules[path][0].site == EMBEDDING


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """The tensors of one module, by the suffix of their names."""

    module: str
    shapes: Mapping[str, Shape]

    def name(self, suffix: str) -> str:
        """The full name of the tensor with a suffix."""
        return f"{PREFIX}{self.module}.{suffix}"

    @property
    def any_name(self) -> str:
        """The full name of one of them."""
        return self.name(min(self.shapes))

    def require(self, suffixes: Collection[str]) -> None:
        """Check that all of these are there, and nothing else.

        Raises:
            AdapterInvalidError: names a tensor, and the partner that it lacks.
            AdapterUnsupportedError: a tensor would not be used.
        """
        for suffix in sorted(suffixes):
            if suffix not in self.shapes:
                raise AdapterInvalidError(self.any_name, f"its partner {shown(self.name(suffix))} is missing")
        for suffix in sorted(self.shapes):
            if suffix not in suffixes:
                raise unusable(self.name(suffix))


def group_tensors(shapes: Mapping[str, Shape], suffixes: Collection[str]) -> list[ModuleTensors]:
    """Group tensors by module, ordered by module.

    Raises:
        ArtifactError: a tensor has none of the suffixes; every tensor must be used.
    """
    modules: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        module, suffix = _split_name(name, suffixes)
        modules.setdefault(module, {})[suffix] = shape
    return [ModuleTensors(module, modules[module]) for module in sorted(modules)]


def _split_name(name: str, suffixes: Collection[str]) -> tuple[str, str]:
    for suffix in suffixes:
        if name.startswith(PREFIX) and name.endswith(f".{suffix}"):
            return name[len(PREFIX) : -len(suffix) - 1], suffix
    raise unusable(name)


def unusable(name: str) -> AdapterInvalidError | AdapterUnsupportedError:
    """Why a tensor cannot be used: what it is part of, as far as its name shows."""
    if (".lora_A." in name or ".lora_B." in name) and not name.endswith(".bias"):
        return AdapterInvalidError(
            name, "is not named as PEFT saves it: base_model.model.<module>.lora_A.weight"
        )
    for part, what in _FOREIGN_TENSORS.items():
        if part in name:
            return AdapterUnsupportedError(name, f"belongs to {what}")
    if name.startswith(PREFIX) and name.endswith(".weight"):
        return AdapterUnsupportedError(
            name, "is a weight trained as a whole; only the embedding's and the head's are served"
        )
    return AdapterInvalidError(name, "is not a tensor of this method; every tensor must be used")


@dataclass(frozen=True, slots=True)
class Misfit:
    """A tensor that does not fit the base, and why."""

    tensor: str
    description: str


def find_misfit(tensors: ModuleTensors, suffix: str, expected: Sequence[int | str]) -> Misfit | None:
    """Compare a shape with the expected one, in which words stand for any size."""
    shape = tensors.shapes[suffix]
    is_same = len(shape) == len(expected) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(shape, expected, strict=True)
    )
    if is_same:
        return None
    wanted = ", ".join(str(size) for size in expected)
    return Misfit(tensors.name(suffix), f"has shape {list(shape)}; expected [{wanted}]")


def missing_module(tensors: ModuleTensors, base: BaseDescription) -> Misfit:
    """The misfit of tensors whose module the base lacks, or has where the method is not served."""
    path = base.module_of(tensors.module)
    if path is not None and base.modules[path][0].site.is_of_mixture:
        return Misfit(tensors.any_name, f"acts on {shown(path)}; in mixtures of experts only LoRA is served")
    return Misfit(tensors.any_name, f"acts on {shown(tensors.module)}, which is not a linear of the base")


def raise_misfits(
    misfits: Sequence[Misfit], modules: Sequence[ModuleTensors], base: BaseDescription, base_model: str
) -> None:
    """Refuse an artifact with misfits, or with two modules that are one of the base's.

    Args:
        misfits: at most one per module.
        modules: of the artifact.
        base: the resident one.
        base_model: what the artifact names as its own.

    Raises:
        BaseMismatchError: none of several modules fits, and the artifact does not name this base.
        AdapterInvalidError: only some do not, or two modules are one.
    """
    if not misfits:
        _check_distinct(modules, base)
        return
    first = misfits[0]
    if len(misfits) == len(modules) > 1 and not is_known_name(base_model, base):
        raise BaseMismatchError(
            first.tensor, f"no tensor fits this server's base; this one {first.description}"
        )
    raise AdapterInvalidError(first.tensor, first.description)


def _check_distinct(modules: Sequence[ModuleTensors], base: BaseDescription) -> None:
    found: dict[str | None, ModuleTensors] = {}
    for tensors in modules:
        other = found.setdefault(base.module_of(tensors.module), tensors)
        if other is not tensors:
            raise AdapterInvalidError(tensors.any_name, f"acts on the same module as {shown(other.any_name)}")


def candidate_of(artifact: AdapterArtifact) -> Candidate:
    """An artifact in memory as what its checks take."""
    shapes, head_shapes = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (artifact.tensors, artifact.head_tensors)
    )
    return Candidate(artifact.config, shapes, artifact.base_model, artifact.head_config, head_shapes)


def check_finite(name: str, derived: Tensor) -> Tensor:
    """The tensor itself, computed from stored ones.

    Raises:
        AdapterInvalidError: it overflowed.
    """
    if not bool(torch.isfinite(derived).all()):
        raise AdapterInvalidError(name, "gives values that are not finite")
    return derived
