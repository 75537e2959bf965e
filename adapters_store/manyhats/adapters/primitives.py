"""The few operations that every method is lowered to; the engine's kernels run these and know no method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from manyhats.adapters.sites import Site


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A low-rank delta of one linear: ``y += scale · (x Aᵀ) Bᵀ``.

    Attributes:
        site: the linear.
        a: [R, d_in].
        b: [d_out, R].
        scale: dimensionless; alpha / R for plain LoRA.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
    """

    site: Site
    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class LoweredAdapter:
    """One adapter as primitives, ready for the engine; ``digest`` names the artifact it came from."""

    digest: str
    deltas: tuple[LowRank, ...]
