"""What the adapters of a step do, as numbers on the host: which kernels to launch, and how far they reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Acting:
    """Of one adapter, or the most of several.

    Attributes:
        rank: the largest at linears of layers; 0 for none.
        outputs: groups of linears of which some outputs change, in any layer.
        inputs: groups of linears whose input is rescaled.
        bottleneck: the largest size; 0 for none.
        sublayers: the places that have bottlenecks, in any layer.
        norms_skipped: those of which a bottleneck skips the norm of the stream.
        changes_embeddings: whether the embedding has other rows, or a delta.
        head_weight: rows of an output head that replaces the base's.
        head_rows: rows that replace the output head's.
        head_rank: of the output head's delta.
        scaled: linears whose input is rescaled, but not that of others which read the same.
        gates: groups of linears, places of bottlenecks, and ``prefix``, where something has a gate.
        ends: places of which a bottleneck changes some rows of a text.
        expert_rank: the largest at experts; 0 for none.
    """

    rank: int = 0
    outputs: frozenset[str] = frozenset()
    inputs: frozenset[str] = frozenset()
    bottleneck: int = 0
    sublayers: frozenset[str] = frozenset()
    norms_skipped: frozenset[str] = frozenset()
    changes_embeddings: bool = False
    head_weight: int = 0
    head_rows: int = 0
    head_rank: int = 0
    scaled: frozenset[str] = frozenset()
    gates: frozenset[str] = frozenset()
    ends: frozenset[str] = frozenset()
    expert_rank: int = 0

    @classmethod
    def most(cls, each: Iterable[Acting]) -> Acting:
        """The most of each: nothing that one of them does is missing."""
        all_of_them = (cls(), *each)
        return cls(*(_most([getattr(one, field.name) for one in all_of_them]) for field in fields(cls)))

    def rounded(self, up: Callable[[int], int]) -> Acting:
        """The same with the sizes at layers rounded up."""
        return replace(
            self, rank=up(self.rank), bottleneck=up(self.bottleneck), expert_rank=up(self.expert_rank)
        )

    @property
    def changes_head(self) -> bool:
        """Whether logits change other than through hidden values."""
        return max(self.head_weight, self.head_rows, self.head_rank) > 0


def _most(values: list[Any]) -> Any:
    return frozenset().union(*values) if isinstance(values[0], frozenset) else max(values)
