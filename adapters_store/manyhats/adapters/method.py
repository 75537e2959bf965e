"""What every method provides; each has its file in ``methods/``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription


@dataclass(frozen=True, slots=True)
class Candidate:
    """An artifact before its tensors are read: its config and its header.

    Attributes:
        config: the parsed ``adapter_config.json``.
        shapes: tensor name → shape.
        base_model: what it names as its base; may be empty.
        head_config: the parsed ``head_config.json``; None without a head in files of its own.
        head_shapes: of that head's tensors.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    base_model: str
    head_config: Mapping[str, Any] | None = None
    head_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Method(Protocol):
    """One way of adapting a model: checks an artifact, and lowers it to primitives."""

    @property
    def method(self) -> AdapterMethod:
        """Its name."""
        ...

    def check_base(self, base: BaseDescription) -> None:
        """Refuse a base on which no artifact of the method is served.

        Raises:
            AdapterUnsupportedError: says why.
        """
        ...

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what could not be served exactly, before any tensor is read.

        Raises:
            ArtifactError: names the key or tensor that is at fault.
            BaseMismatchError: the tensors fit another base.
        """
        ...

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """The artifact as primitives.

        Raises:
            ArtifactError, BaseMismatchError: as ``check``, for an artifact that never passed it.
        """
        ...


class OnAnyBase:
    """What methods share that are served on every base."""

    def check_base(self, base: BaseDescription) -> None:
        """Nothing to refuse."""
