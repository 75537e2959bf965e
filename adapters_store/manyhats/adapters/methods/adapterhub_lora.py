"""LoRA as AdapterHub saves it: ``y += alpha / R · (x Aᵀ) Bᵀ``, on the linears that the tensors name.

On Llama the library calls down_proj *intermediate* and up_proj *output*, elsewhere the other way round, so the
tensors' names decide. Versions before 1.1 did not scale at all.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; the equation is that of ``lora``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, shown
from manyhats.adapters.formats.adapterhub.loras import AdaptedLinear, find_linears, read_config
from manyhats.adapters.formats.adapterhub.tensors import TensorNames, full_path
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate
from manyhats.adapters.primitives import LoweredAdapter, LowRank
from manyhats.adapters.sites import BaseDescription


@dataclass(frozen=True, slots=True)
class AdapterHubLoraMethod:
    """LoRA from an AdapterHub directory."""

    @property
    def method(self) -> AdapterMethod:
        """LORA."""
        return AdapterMethod.LORA

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: every tensor must be used, fit, and keep to the limits."""
        config, name = read_config(candidate.config, base)
        if config.rank > limits.max_rank:
            raise AdapterTooLargeError("r", f"is {config.rank}; the limit is {limits.max_rank}")
        names = TensorNames(candidate.shapes)
        for linear in find_linears(config, name, names, base):
            _check_pair(linear, config.rank, names, candidate.shapes, base)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """One ``LowRank`` per linear, ordered by site; the matrices keep their stored dtype."""
        config, name = read_config(artifact.config, base)
        names = TensorNames(artifact.tensors)
        shapes = {tensor: tuple(value.shape) for tensor, value in artifact.tensors.items()}
        deltas = []
        for linear in find_linears(config, name, names, base):
            _check_pair(linear, config.rank, names, shapes, base)
            a, b = (names.pick(artifact.tensors, linear.parts[part]) for part in ("lora_A", "lora_B"))
            deltas.append(LowRank(linear.site, a, b, config.alpha / config.rank))
        return LoweredAdapter(digest=artifact.digest, deltas=tuple(deltas))


def _check_pair(
    linear: AdaptedLinear,
    rank: int,
    names: TensorNames,
    shapes: Mapping[str, tuple[int, ...]],
    base: BaseDescription,
) -> None:
    d_in, d_out = base.linears[linear.site.name]
    present = names.names(next(iter(linear.parts.values())))[0]
    for part, expected in (("lora_A", (rank, d_in)), ("lora_B", (d_out, rank))):
        if part not in linear.parts:
            module = full_path(present.rpartition(".")[0].removeprefix("model."))
            raise AdapterInvalidError(present, f"its partner {shown(f'{module}.{part}')} is missing")
        for tensor in names.names(linear.parts[part]):
            if shapes[tensor] != expected:
                raise AdapterInvalidError(
                    tensor, f"has shape {list(shapes[tensor])}; expected {list(expected)}"
                )
