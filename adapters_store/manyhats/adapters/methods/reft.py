"""Representation fine-tuning: low-rank interventions on the layers' outputs, at the ends of a text.

A layer's output x becomes ``x + Rᵀ(act(W x + b) − R x)`` for the first ``prefix_positions`` rows of a text by unit 0,
and for the last ``suffix_positions`` rows by unit 1, or 0 too with ``tied_weights``. Without a non-linearity, as LoReFT
has it, that is ``x + Rᵀ((W − R) x + b)``, a bottleneck. LoReFT's R has orthonormal rows, and is saved as a
parametrization. Of a text that is shorter than ``suffix_positions`` unit 1 changes all rows; the library mixes them up.

The library leaves ``subtract_projection`` out of what it saves, which alone distinguishes DiReFT, whose term R x is
missing, from NoReFT, and computes NoReFT after loading either. So both have to say which they are.

Source: Wu et al. 2024 (arXiv:2404.03592), sections 3.2 and 4.1; files and rows as AdapterHub has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.activations import activation_name
from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, AdapterUnsupportedError
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.adapterhub.fields import read_count, read_flag, refuse_unserved
from manyhats.adapters.formats.adapterhub.places import check_encoder, places_of
from manyhats.adapters.formats.adapterhub.tensors import (
    TensorNames,
    check_layers,
    check_shapes,
    full_path,
    plain_names,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate
from manyhats.adapters.primitives import Bottleneck, BottleneckInput, LoweredAdapter, TextEnds
from manyhats.adapters.sites import BaseDescription, Site

_KNOWN = frozenset(
    (
        "architecture",
        "layers",
        "prefix_positions",
        "suffix_positions",
        "r",
        "orthogonality",
        "tied_weights",
        "subtract_projection",
        "non_linearity",
        "output_reft",
        # These matter only in training, or show in the tensors.
        "dropout",
        "dtype",
        "init_weights_seed",
    )
)
_MAX_POSITIONS = 4096
_ORTHOGONAL = 1e-3
"""How far R Rᵀ may be from the identity; the library's own is within 1e-6 in float32."""
_PARAMETRIZED = "projection.parametrizations.weight."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Config:
    """The config's fields that determine the maths, and where tensors lie.

    Attributes:
        ends: the rows of a text that change.
        is_orthogonal: whether R is parametrized.
        is_subtracted: whether there is the term R x.
        units: layer → the plain names of its units, with a dot at their ends.
    """

    rank: int
    ends: TextEnds
    is_orthogonal: bool
    is_subtracted: bool
    activation: str
    units: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class ReftMethod:
    """LoReFT and its kin from an AdapterHub directory, on encoders."""

    @property
    def method(self) -> AdapterMethod:
        """REFT."""
        return AdapterMethod.REFT

    def check_base(self, base: BaseDescription) -> None:
        """Refuse decoders."""
        check_encoder(base, "architecture", "ReFT, which acts on the last rows of a text too")

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: no tensor missing, left over or of another shape."""
        self.check_base(base)
        config = _read_config(candidate.config, base)
        if config.rank > limits.max_rank:
            raise AdapterTooLargeError("r", f"is {config.rank}; the limit is {limits.max_rank}")
        _check_tensors(config, candidate.shapes, base)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """One ``Bottleneck`` per layer, of both units that act there, float32."""
        self.check_base(base)
        config = _read_config(artifact.config, base)
        shapes = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
        names = _check_tensors(config, shapes, base)
        read = partial(names.pick, artifact.tensors)
        deltas = tuple(
            _lower_layer(config, Site(layer, "output"), units, read, base)
            for layer, units in config.units.items()
        )
        return LoweredAdapter(artifact.digest, deltas)


def _read_config(outer: Mapping[str, Any], base: BaseDescription) -> _Config:
    adapterhub_format.check_base(outer, base)
    config = adapterhub_format.method_config(outer)
    refuse_unserved(config, known=_KNOWN, refused={})
    if not read_flag(config, "output_reft", True):
        raise AdapterInvalidError("output_reft", "is not set: there is no adapter")
    is_tied, is_orthogonal = (
        read_flag(config, "tied_weights", False),
        read_flag(config, "orthogonality", True),
    )
    is_subtracted = _is_projection_subtracted(config, is_orthogonal)
    first, last = (_read_positions(config, key) for key in ("prefix_positions", "suffix_positions"))
    if not first and not last:
        raise AdapterInvalidError("prefix_positions", "is 0, as suffix_positions: there is no adapter")
    rank = read_count(config, "r", 1)
    if is_orthogonal and rank >= base.hidden_size:
        raise AdapterUnsupportedError(
            "r", f"is {rank}; fewer than the base's {base.hidden_size} dimensions are served"
        )
    return _Config(
        rank=rank,
        ends=TextEnds(first, last, is_split=not is_tied),
        is_orthogonal=is_orthogonal,
        is_subtracted=is_subtracted,
        activation=_read_activation(config, is_subtracted),
        units=_units(config, adapterhub_format.adapter_name(outer), 1 if is_tied else 2, base),
    )


def _is_projection_subtracted(config: Mapping[str, Any], is_orthogonal: bool) -> bool:
    if config.get("subtract_projection") is None and not is_orthogonal:
        raise AdapterUnsupportedError(
            "subtract_projection",
            "is missing, as the library leaves it out: set it to false if this was trained as DiReFT, "
            "to true if as NoReFT",
        )
    return read_flag(config, "subtract_projection", True)


def _read_positions(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key, 0)
    if type(value) is not int or not 0 <= value <= _MAX_POSITIONS:
        raise AdapterInvalidError(key, f"must be a whole number from 0 to {_MAX_POSITIONS}")
    return value


def _read_activation(config: Mapping[str, Any], is_subtracted: bool) -> str:
    value = config.get("non_linearity")
    if value is None:
        return "linear"
    if is_subtracted:
        raise AdapterUnsupportedError(
            "non_linearity", "is served only where subtract_projection is false, as in DiReFT"
        )
    return activation_name("non_linearity", value)


def _units(
    config: Mapping[str, Any], name: str, count: int, base: BaseDescription
) -> Mapping[int, tuple[str, ...]]:
    layers = config.get("layers", "all")
    if layers != "all" and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise AdapterInvalidError("layers", "must be a list of layer numbers, or all")
    places = places_of(base.model_type)
    return {
        layer: tuple(
            f"{places.layer}.{layer}.{places.reft}.refts.{name}.units.{unit}." for unit in range(count)
        )
        for layer in range(base.num_layers)
        if layers == "all" or layer in layers
    }


def _check_tensors(
    config: _Config, shapes: Mapping[str, tuple[int, ...]], base: BaseDescription
) -> TensorNames:
    names = plain_names(shapes, base)
    check_layers(names, base)
    rank, size = config.rank, base.hidden_size
    expected: dict[str, tuple[int, ...]] = {}
    for unit in (unit for units in config.units.values() for unit in units):
        expected |= {f"{unit}learned_source.weight": (rank, size), f"{unit}learned_source.bias": (rank,)}
        if config.is_orthogonal:
            expected |= {
                f"{unit}{_PARAMETRIZED}original": (rank, size),
                f"{unit}{_PARAMETRIZED}0.base": (size, size),
            }
        else:
            expected[f"{unit}projection.weight"] = (rank, size)
    check_shapes(names, shapes, expected, base)
    return names


def _lower_layer(
    config: _Config,
    site: Site,
    units: tuple[str, ...],
    read: Callable[[str], Tensor],
    base: BaseDescription,
) -> Bottleneck:
    down, bias, up = [], [], []
    for unit in units:
        weight = read(f"{unit}learned_source.weight").float()
        projection = _projection(config, unit, read, base)
        down.append(weight - projection if config.is_subtracted else weight)
        bias.append(read(f"{unit}learned_source.bias").float())
        up.append(projection.T)
    return Bottleneck(
        site=site,
        input=BottleneckInput.OUTPUT,
        down=torch.cat(down),
        down_bias=torch.cat(bias),
        up=torch.cat(up, dim=1),
        up_bias=torch.zeros(base.hidden_size),
        activation=config.activation,
        scale=torch.ones(1),
        ends=config.ends,
    )


def _projection(config: _Config, unit: str, read: Callable[[str], Tensor], base: BaseDescription) -> Tensor:
    """R [r, D] float32.

    Raises:
        AdapterInvalidError: it should have orthonormal rows, and has not.
    """
    if not config.is_orthogonal:
        return read(f"{unit}projection.weight").float()
    original = f"{unit}{_PARAMETRIZED}original"
    projection = orthonormal_rows(
        read(original).double(), read(f"{unit}{_PARAMETRIZED}0.base").double()
    ).float()
    if (projection @ projection.T - torch.eye(config.rank)).abs().max() > _ORTHOGONAL:
        raise AdapterInvalidError(full_path(base, original), "does not give orthonormal rows")
    return projection


def orthonormal_rows(original: Tensor, base: Tensor) -> Tensor:
    """R of torch's parametrization by Householder reflections, as a linear of fewer rows than columns has it.

    With V the columns of ``original``ᵀ below its diagonal s and 1 on it, ``Rᵀ = base · H₁ … H_r[:, :r] · s``,
    ``H_i = 1 − 2 vᵢ vᵢᵀ / |vᵢ|²``. The library takes s without its fraction, and so does this.

    Args:
        original: [r, D], r < D.
        base: [D, D], orthogonal.

    Returns:
        [r, D].

    Source: torch.nn.utils.parametrizations.orthogonal.
    """
    tall = original.T
    reflectors = tall.tril(diagonal=-1)
    taus = 2.0 / (1.0 + reflectors.square().sum(dim=0))
    signs = tall.diagonal().trunc()
    columns = torch.linalg.householder_product(reflectors, taus) * signs
    rows: Tensor = (base @ columns).T
    return rows
