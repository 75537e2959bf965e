"""Tensors of an AdapterHub artifact, found by the names that the library gives them.

A name begins with the prefix of the base's modules (``model.``, ``bert.``) or not, as the library saved a model with a
head or without one; and the library's pickles hold a shared tensor under each of its names. Both are brought to one
*plain* name here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterUnsupportedError,
    BaseMismatchError,
    shown,
)
from manyhats.adapters.formats.adapterhub.places import places_of
from manyhats.adapters.primitives import Gate
from manyhats.adapters.sites import BaseDescription

# Part of a tensor's name → what it belongs to.
_UNSERVED: Mapping[str, str] = {
    "cross_attention_adapters.": "cross_adapter",
    ".adapter_fusion_layer.": "AdapterFusion",
    ".vera_": "VeRA",
    ".m.weight": "use_dora, DoRA as AdapterHub computes it",
}


def plain_name(base: BaseDescription, name: str) -> str:
    """A tensor's name without the leading prefix of the base's modules."""
    return name.removeprefix(base.prefix)


def full_path(base: BaseDescription, plain: str) -> str:
    """Path of a module in the base with its head, by its plain name."""
    return base.prefix + plain


class TensorNames:
    """The names in a file, by plain name; several names may stand for one tensor.

    Args:
        names: as the file has them.
        plain: name → plain name.
    """

    def __init__(self, names: Iterable[str], plain: Callable[[str], str]) -> None:
        groups: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names):
            groups[plain(name)].append(name)
        self._groups = {key: tuple(group) for key, group in groups.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __contains__(self, plain: object) -> bool:
        return plain in self._groups

    def names(self, plain: str) -> tuple[str, ...]:
        """What the file calls a tensor."""
        return self._groups[plain]

    def pick(self, tensors: Mapping[str, Tensor], plain: str) -> Tensor:
        """The tensor of a plain name.

        Raises:
            AdapterInvalidError: its names stand for different values.
        """
        first, *others = self._groups[plain]
        for other in others:
            if not torch.equal(tensors[first], tensors[other]):
                raise AdapterInvalidError(other, f"must equal {shown(first)}, which it repeats")
        return tensors[first]


def plain_names(names: Iterable[str], base: BaseDescription) -> TensorNames:
    """The names in a file for a base."""
    return TensorNames(names, partial(plain_name, base))


def gate_shapes(module: str, size: int, count: int = 1) -> dict[str, tuple[int, ...]]:
    """The tensors of a gate, by plain name; ``module`` ends with a dot."""
    return {f"{module}weight": (count, size), f"{module}bias": (count,)}


def pick_gate(names: TensorNames, tensors: Mapping[str, Tensor], module: str) -> Gate:
    """A gate, whose module's plain name ends with a dot."""
    return Gate(*(names.pick(tensors, f"{module}{part}") for part in ("weight", "bias")))


def check_shapes(
    names: TensorNames,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    base: BaseDescription,
) -> None:
    """Compare what the file holds with what the config asks for: nothing missing, nothing left over.

    Args:
        names: of the file.
        shapes: by the file's names.
        expected: by plain names.
        base: whose modules have a prefix.

    Raises:
        AdapterUnsupportedError: a tensor of something that is not served.
        AdapterInvalidError: a tensor is missing, left over, or has another shape.
    """
    for plain in names:
        if plain not in expected:
            refuse_tensor(names.names(plain)[0])
    check_expected(names, shapes, expected, base)


def check_expected(
    names: TensorNames,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    base: BaseDescription,
) -> None:
    """Check that tensors are there and have their shapes; the arguments are those of ``check_shapes``.

    Raises:
        AdapterInvalidError: a tensor is missing, or has another shape.
    """
    for plain, shape in expected.items():
        if plain not in names:
            raise AdapterInvalidError(full_path(base, plain), "is missing, though the config asks for it")
        for name in names.names(plain):
            if shapes[name] != shape:
                raise AdapterInvalidError(name, f"has shape {list(shapes[name])}; expected {list(shape)}")


def refuse_tensor(name: str) -> NoReturn:
    """Say why a tensor cannot be used.

    Raises:
        AdapterUnsupportedError: it belongs to something that is not served.
        AdapterInvalidError: the config does not ask for it.
    """
    for part, what in _UNSERVED.items():
        if part in name:
            raise AdapterUnsupportedError(name, f"belongs to {what}, which is not served")
    raise AdapterInvalidError(name, "is not a tensor the config asks for; every tensor must be used")


def check_layers(names: TensorNames, base: BaseDescription) -> None:
    """Refuse an adapter with more layers than the base.

    Raises:
        BaseMismatchError: names the tensor.
    """
    places = places_of(base.model_type)
    for plain in names:
        split = places.split(plain)
        if split is not None and split[0] >= base.num_layers:
            raise BaseMismatchError(
                names.names(plain)[0], f"acts on layer {split[0]}; the base has {base.num_layers} layers"
            )
