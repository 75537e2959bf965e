"""IA3 as AdapterHub saves it: each adapted linear's *output*, bias included, times a vector.

``y' = y ⊙ (alpha · l)``. PEFT's IA3 rescales the *input* of feed-forward modules instead; here every module is
treated alike. On Llama the default adapts k, v and down_proj.

Source: Liu et al. 2022 (arXiv:2205.05638), section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError
from manyhats.adapters.formats.adapterhub.loras import LorasConfig, find_linears, read_config
from manyhats.adapters.formats.adapterhub.tensors import TensorNames
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate
from manyhats.adapters.primitives import Affine, LoweredAdapter
from manyhats.adapters.sites import BaseDescription, Site


def rescaled_output(y: Tensor, scale: Tensor) -> Tensor:
    """``y ⊙ scale``: y [..., d_out], a linear's output; scale [d_out]."""
    return y * scale


@dataclass(frozen=True, slots=True)
class AdapterHubIa3Method:
    """IA3 from an AdapterHub directory."""

    @property
    def method(self) -> AdapterMethod:
        """IA3."""
        return AdapterMethod.IA3

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: every tensor must be used and fit."""
        config, name = _read_config(candidate.config, base)
        names = TensorNames(candidate.shapes)
        for site, plain in _vectors(config, name, names, base):
            _check_shape(names, plain, candidate.shapes, base.linears[site.name][1])

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """One ``Affine`` per linear, ordered by site; vectors are float32."""
        config, name = _read_config(artifact.config, base)
        names = TensorNames(artifact.tensors)
        shapes = {tensor: tuple(value.shape) for tensor, value in artifact.tensors.items()}
        deltas = []
        for site, plain in _vectors(config, name, names, base):
            _check_shape(names, plain, shapes, base.linears[site.name][1])
            vector = names.pick(artifact.tensors, plain).float().reshape(-1)
            deltas.append(Affine(site=site, scale=vector * config.alpha, offset=None))
        return LoweredAdapter(digest=artifact.digest, deltas=tuple(deltas))


def _read_config(config: Mapping[str, Any], base: BaseDescription) -> tuple[LorasConfig, str]:
    parsed, name = read_config(config, base)
    if parsed.rank != 1:
        raise AdapterInvalidError("r", f"is {parsed.rank}; with composition_mode 'scale' it must be 1")
    return parsed, name


def _vectors(
    config: LorasConfig, name: str, names: TensorNames, base: BaseDescription
) -> list[tuple[Site, str]]:
    """Each adapted linear, and the plain name of its vector."""
    vectors = []
    for linear in find_linears(config, name, names, base):
        if "lora_A" in linear.parts:
            tensor = names.names(linear.parts["lora_A"])[0]
            raise AdapterInvalidError(tensor, "is not part of IA3, which has only the vector lora_B")
        vectors.append((linear.site, linear.parts["lora_B"]))
    return vectors


def _check_shape(names: TensorNames, plain: str, shapes: Mapping[str, tuple[int, ...]], d_out: int) -> None:
    for tensor in names.names(plain):
        if shapes[tensor] != (d_out, 1):
            raise AdapterInvalidError(tensor, f"has shape {list(shapes[tensor])}; expected {[d_out, 1]}")
