"""A version in memory: the artifacts it is made of, and the one adapter that they form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyhats.adapters.artifact import AdapterArtifact, AdapterRecord
from manyhats.adapters.formats.base_name import check_base_name, is_registered_for
from manyhats.adapters.formats.recognition import base_name_key
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.composition import AdapterPart, compose
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription


@dataclass(frozen=True, slots=True, eq=False)
class LoadedVersion:
    """A version's record and its artifacts, one per part and in the order of ``record.parts``."""

    record: AdapterRecord
    artifacts: tuple[AdapterArtifact, ...]


def lower_version(version: LoadedVersion, base: BaseDescription, limits: AdapterLimits) -> LoweredAdapter:
    """The version as primitives of the base's sites; its digest is the record's.

    Raises:
        ArtifactError: it cannot be served exactly.
        BaseMismatchError: it was made for another base.
    """
    # Registration compared the names; whether a path exists, or what the operator said, is not asked again.
    strangers = () if is_registered_for(version.record.registered_for, base) else version.artifacts
    for artifact in strangers:
        check_base_name(artifact.base_model, base, base_name_key(artifact.config))
    lowered = [lower(artifact, base) for artifact in version.artifacts]
    if not version.record.is_composed:
        return lowered[0]
    weights = [part.weight for part in version.record.parts]
    return compose_parts(lowered, weights, limits)


def compose_parts(
    adapters: Sequence[LoweredAdapter], weights: Sequence[float], limits: AdapterLimits
) -> LoweredAdapter:
    """``compose``, with errors naming parts by position: ``parts[0]`` and so on."""
    pairs = zip(adapters, weights, strict=True)
    parts = [AdapterPart(part_name(i), adapter, weight) for i, (adapter, weight) in enumerate(pairs)]
    return compose(parts, limits)


def part_name(index: int) -> str:
    """How errors and notes name a part."""
    return f"parts[{index}]"
