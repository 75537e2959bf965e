"""The resident weights as adapters' methods read them: dense, float32, one linear at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from manyhats.adapters.sites import HEAD, Site
from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Linear, Weights


@dataclass(frozen=True, slots=True)
class ModelWeightSource:
    """A ``WeightSource`` over a loaded model; it keeps nothing that it dequantizes.

    Attributes:
        digest: of the base; two sources of one base are equal.
        weights: the model's.
    """

    digest: str
    weights: Weights = field(compare=False, repr=False)

    def linear(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """Weight [d_out, d_in] and bias [d_out] or None, float32, of a layer's linear or of ``lm_head``.

        Raises:
            ModelError: the site is not a linear of this model.
        """
        linear = self._linear(site)
        if linear is None:
            raise ModelError(f"{site} is not a linear of this model")
        matrix, bias = linear.matrix, linear.bias
        weight = matrix.dequantize() if isinstance(matrix, Nf4Weight) else matrix.float()
        return weight, None if bias is None else bias.float()

    def _linear(self, site: Site) -> Linear | None:
        if site == HEAD:
            return self.weights.head
        if not 0 <= site.layer < len(self.weights.blocks):
            return None
        return self.weights.blocks[site.layer].linears.get(site.name)
