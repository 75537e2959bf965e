"""Checkpoints that keep the matrices of all experts of a layer in one tensor, as transformers 5 has them in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from manyhats.engine.errors import ModelError
from manyhats.engine.model.layout import Family


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix is: in which tensor, of which expert, and which part of that expert's rows."""

    tensor: str
    expert: int
    part: int
    num_parts: int


def with_experts_apart(tensors: Mapping[str, Tensor], family: Family) -> Mapping[str, Tensor]:
    """A checkpoint's tensors by the names that its family's files have, whether or not its experts are stacked.

    Raises:
        ModelError: a stack has another shape than the config asks for, or a matrix is there twice.
    """
    layout = family.layout.of_files(tensors)
    renamed: dict[str, str] = {}
    places: dict[str, _Place] = {}
    for layer, block in enumerate(family.architecture.blocks):
        for below, paths in layout.stacked.items():
            name, experts = layout.path(layer, below), block.feed_forward.experts
            own = [f"{layout.path(layer, path)}.weight" for path in paths]
            if experts is not None and name in tensors:
                _check_stack(name, tensors[name], experts.num, len(paths))
                for expert in range(experts.num):
                    for part, each in enumerate(own):
                        places[each.format(expert=expert)] = _Place(name, expert, part, len(own))
            elif experts is not None and f"{name}.weight" in tensors and own[0] not in tensors:
                renamed[own[0]] = f"{name}.weight"
    for name, place in places.items():
        if name in tensors:
            raise ModelError(f"{place.tensor}: holds {name}, which the checkpoint has by itself, too")
    return _Apart(tensors, renamed, places) if places or renamed else tensors


def _check_stack(name: str, stack: Tensor, num_experts: int, num_parts: int) -> None:
    shape = tuple(stack.shape)
    if len(shape) != 3 or shape[0] != num_experts or shape[1] % num_parts:
        raise ModelError(
            f"{name}: has shape {list(shape)}; the config asks for one matrix for each of {num_experts} experts"
        )


class _Apart(Mapping[str, Tensor]):
    """Matrices as views of the stacks, and the other tensors."""

    def __init__(
        self, tensors: Mapping[str, Tensor], renamed: Mapping[str, str], places: Mapping[str, _Place]
    ) -> None:
        self._tensors = tensors
        self._renamed = renamed
        self._places = places
        hidden = {place.tensor for place in places.values()} | set(renamed.values())
        self._names = dict.fromkeys((*(name for name in tensors if name not in hidden), *renamed, *places))
        self._recent: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        place = self._places.get(name)
        if place is None:
            return self._tensors[self._renamed.get(name, name)]
        return self._stack(place.tensor)[place.expert].chunk(place.num_parts)[place.part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def _stack(self, name: str) -> Tensor:
        """A stack, read once for all its matrices, since a layer's are asked for one after another."""
        if name not in self._recent:
            last = list(self._recent)[-1:]
            self._recent = {each: self._recent[each] for each in last} | {name: self._tensors[name]}
        return self._recent[name]
