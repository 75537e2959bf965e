"""DoRA: LoRA that gives each row of the updated weight a trained length, as PEFT saves it.

The output of an adapted linear is ``y + (c − 1)(y − bias) + c · scale · (x Aᵀ) Bᵀ``, y being the base's, its bias
included: each row of W + scale · BA is c times as long (``dora_gain``), and the base's bias keeps its length.

Source: Liu et al. 2024 (arXiv:2402.09353), section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterUnsupportedError
from manyhats.adapters.formats.peft.lora_tensors import MAGNITUDE, A, B, LinearPlacement
from manyhats.adapters.formats.peft.tensors import check_finite
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate, OnAnyBase
from manyhats.adapters.methods.lora import check_lora, place_artifact
from manyhats.adapters.primitives import Affine, Delta, LoweredAdapter, LowRank
from manyhats.adapters.sites import BaseDescription, WeightSource


@torch.no_grad()
def updated_lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Length of each row of the updated weight, ``‖W + scale · BA‖₂`` by row: [d_out], float32.

    In training these are constants, as in PEFT: no gradient flows through them.

    Args:
        weight: W [d_out, d_in], dequantized.
        a: [R, d_in].
        b: [d_out, R].
        scale: dimensionless; as of LoRA.

    Source: Liu et al. 2024 (arXiv:2402.09353), section 4.3.
    """
    updated = torch.addmm(weight.to(a.device, torch.float32), b.float(), a.float(), alpha=scale)
    return torch.linalg.vector_norm(updated, dim=1)  # type: ignore[no-any-return]


def dora_gain(magnitude: Tensor, lengths: Tensor) -> Tensor:
    """How much longer each row becomes: ``c = m / ‖W + scale · BA‖₂``, [d_out], float32.

    Args:
        magnitude: m [d_out]; the trained lengths.
        lengths: as of ``updated_lengths``.

    Source: Liu et al. 2024 (arXiv:2402.09353), equation 5.
    """
    return magnitude.float() / lengths


@dataclass(frozen=True, slots=True)
class DoraMethod(OnAnyBase):
    """DoRA from a PEFT directory; its gains are computed once, when it is lowered, in float32."""

    @property
    def method(self) -> AdapterMethod:
        """DORA."""
        return AdapterMethod.DORA

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """As LoRA's; every module must have its magnitudes."""
        check_lora(candidate, base, limits)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """An ``Affine`` and a ``LowRank`` per linear, float32.

        Raises:
            AdapterUnsupportedError: the base's weights are not available.
        """
        placements, saved = place_artifact(artifact, base)
        if base.weights is None:
            raise AdapterUnsupportedError("use_dora", "needs the base's weights, which are not available")
        deltas = [
            delta
            for placement in placements.linears
            for delta in _lower_linear(placement, artifact.tensors, base.weights)
        ]
        return LoweredAdapter(artifact.digest, (*deltas, *saved.lower(artifact.tensors, base)))


def _lower_linear(
    placement: LinearPlacement, tensors: Mapping[str, Tensor], weights: WeightSource
) -> Iterator[Delta]:
    """Norms are by row, so each part of a fused module has its own rows of B and of the magnitudes."""
    target, names = placement.target, placement.tensors
    a = tensors[names.name(A)].float()
    magnitudes = target.split(tensors[names.name(MAGNITUDE)])
    for part, b, magnitude in zip(
        target.parts, target.split(tensors[names.name(B)].float()), magnitudes, strict=True
    ):
        weight, bias = weights.linear(part.site)
        lengths = check_finite(names.name(A), updated_lengths(weight, a, b, placement.scale))
        gain = check_finite(names.name(MAGNITUDE), dora_gain(magnitude, lengths))
        offset = None if bias is None else (1 - gain) * bias.to(gain)
        yield Affine(part.site, gain, offset)
        yield LowRank(part.site, a, check_finite(names.name(B), gain.unsqueeze(1) * b), placement.scale)
