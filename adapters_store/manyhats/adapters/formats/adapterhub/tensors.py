"""Tensors of an AdapterHub artifact, found by the names that the library gives them.

A name begins with ``model.`` or not, as the library saved a model with a head or without one; and the library's
pickles hold a shared tensor under each of its names. Both are brought to one *plain* name here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterUnsupportedError,
    BaseMismatchError,
    shown,
)
from manyhats.adapters.sites import BaseDescription

_PREFIX = "model."
_LAYER = re.compile(r"layers\.(0|[1-9]\d{0,5})\.(.+)")

# Part of a tensor's name → what it belongs to.
_UNSERVED: Mapping[str, str] = {
    ".gate.": "use_gating, which averages over the whole sequence",
    ".prefix_gates.": "use_gating, which averages over the whole sequence",
    "invertible_adapters.": "inv_adapter, an invertible adapter on the embedding",
    "cross_attention_adapters.": "cross_adapter",
    ".adapter_fusion_layer.": "AdapterFusion",
    ".vera_": "VeRA",
    ".m.weight": "use_dora, DoRA as AdapterHub computes it",
    ".refts.": "ReFT",
    ".prompt_tunings.": "AdapterHub's prompt tuning",
}


def plain_name(name: str) -> str:
    """A tensor's name without the leading ``model.``."""
    return name.removeprefix(_PREFIX)


def full_path(plain: str) -> str:
    """Path of a module in the causal language model, by its plain name."""
    return _PREFIX + plain


def split_layer(plain: str) -> tuple[int, str] | None:
    """``layers.3.mlp.x`` as (3, ``mlp.x``); None for a tensor outside the layers."""
    match = _LAYER.fullmatch(plain)
    return None if match is None else (int(match[1]), match[2])


class TensorNames:
    """The names in a file, by plain name; several names may stand for one tensor.

    Args:
        names: as the file has them.
        plain: name → plain name.
    """

    def __init__(self, names: Iterable[str], plain: Callable[[str], str] = plain_name) -> None:
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


def check_shapes(
    names: TensorNames, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare what the file holds with what the config asks for: nothing missing, nothing left over.

    Args:
        names: of the file.
        shapes: by the file's names.
        expected: by plain names.

    Raises:
        AdapterUnsupportedError: a tensor of something that is not served.
        AdapterInvalidError: a tensor is missing, left over, or has another shape.
    """
    for plain in names:
        if plain not in expected:
            refuse_tensor(names.names(plain)[0])
    for plain, shape in expected.items():
        if plain not in names:
            raise AdapterInvalidError(full_path(plain), "is missing, though the config asks for it")
        for name in names.names(plain):
            if shapes[name] != shape:
                raise AdapterInvalidError(name, f"has shape {list(shapes[name])}; expected {list(shape)}")


def refuse_tensor(name: str) -> None:
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
    for plain in names:
        split = split_layer(plain)
        if split is not None and split[0] >= base.num_layers:
            raise BaseMismatchError(
                names.names(plain)[0], f"acts on layer {split[0]}; the base has {base.num_layers} layers"
            )
