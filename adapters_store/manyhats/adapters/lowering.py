"""From an artifact to the primitives that the engine runs; one entry per method."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterUnsupportedError
from manyhats.adapters.method import Method
from manyhats.adapters.methods.lora import LoraMethod
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription

METHODS: Mapping[AdapterMethod, Method] = MappingProxyType(
    {method.method: method for method in (LoraMethod(),)}
)


def method_of(method: AdapterMethod) -> Method:
    """The file that knows a method.

    Raises:
        AdapterUnsupportedError: none does yet.
    """
    if method not in METHODS:
        raise AdapterUnsupportedError("method", f"{method.value} adapters are not served yet")
    return METHODS[method]


def lower(artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
    """The artifact as primitives of the base's sites.

    Raises:
        ArtifactError: it cannot be served exactly; registration refuses it with the same error.
        BaseMismatchError: it was made for another base.
    """
    return method_of(artifact.method).lower(artifact, base)


def has_effect(lowered: LoweredAdapter) -> bool:
    """Whether any delta can change an output: neither its scale nor one of its matrices is all zero."""
    return any(
        delta.scale != 0 and bool(torch.any(delta.a != 0)) and bool(torch.any(delta.b != 0))
        for delta in lowered.deltas
    )
