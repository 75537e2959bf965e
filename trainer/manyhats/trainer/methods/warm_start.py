"""Starting from an artifact: its tensors become the parameters, if it is what the settings make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.disk.files import open_local
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.formats.adapterhub.format import adapter_name, is_adapterhub
from manyhats.adapters.formats.adapterhub.tensors import full_path, plain_name
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.reader import ReadAdapter, read_adapter
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.trainer.errors import SettingError
from manyhats.trainer.methods.parametrized import ParametrizedAdapter

_SETTING = "init_from"
_SAVED_ALONG = ".base_layer.weight"

# Methods whose artifacts have the same tensors.
_TAKEN_OVER = {AdapterMethod.PROMPT_TUNING: (AdapterMethod.P_TUNING,)}

_NOT_SAVED = {
    AdapterMethod.PREFIX_TUNING: "a saved prefix is the projection's output; set projection_size to 0",
    AdapterMethod.P_TUNING: "a saved P-tuning artifact is the encoder's output; train prompt tuning from it",
}


def load_artifact(adapter: ParametrizedAdapter, directory: Path, limits: AdapterLimits) -> None:
    """Start from the artifact in a directory, read as a registration reads it.

    Raises:
        SettingError: ``init_from``: it cannot be read, is for another base, or is not what the settings make; names the
            tensor or number.
    """
    _check_parameters_are_tensors(adapter)
    read = _read(adapter, directory, limits)
    if read.artifact.method not in (adapter.method, *_TAKEN_OVER.get(adapter.method, ())):
        theirs, ours = (method.value.replace("_", " ") for method in (read.artifact.method, adapter.method))
        raise SettingError(_SETTING, f"{directory} is {theirs}, but {ours} is being trained")
    try:
        load_tensors(adapter, _renamed(read.artifact, adapter))
        _check_same(adapter.lowered(), read.lowered)
    except SettingError as error:
        raise SettingError(_SETTING, f"{directory}: {error.message}") from error


@torch.no_grad()
def load_tensors(adapter: ParametrizedAdapter, tensors: Mapping[str, Tensor]) -> None:
    """Set the parameters to tensors by the names of the artifact's file: all of them, or none.

    Raises:
        SettingError: ``init_from``: the parameters are not what is saved; or a tensor is missing, unknown or of another
            shape.
    """
    _check_parameters_are_tensors(adapter)
    _check_shapes(adapter, tensors)
    for name, parameter in adapter.parameters.items():
        parameter.copy_(tensors[name])


def _check_shapes(adapter: ParametrizedAdapter, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name not in adapter.parameters:
            raise SettingError(_SETTING, f"has {name}, which these settings do not make")
        wanted = adapter.parameters[name].shape
        if tensor.shape != wanted:
            raise SettingError(
                _SETTING, f"{name} has shape {list(tensor.shape)}; these settings make {list(wanted)}"
            )
    if missing := [name for name in adapter.parameters if name not in tensors]:
        raise SettingError(_SETTING, f"lacks {missing[0]}, which these settings make")


def _check_parameters_are_tensors(adapter: ParametrizedAdapter) -> None:
    if adapter.reparametrize is not None:
        raise SettingError(_SETTING, _NOT_SAVED[adapter.method])


def _read(adapter: ParametrizedAdapter, directory: Path, limits: AdapterLimits) -> ReadAdapter:
    resolved = directory.resolve()
    try:
        with open_local(resolved) as source:
            return read_adapter(source, adapter.base, limits)
    except AdapterError as error:
        text = str(error)
        raise SettingError(_SETTING, text if str(resolved) in text else f"{directory}: {text}") from error


def _renamed(artifact: AdapterArtifact, adapter: ParametrizedAdapter) -> Mapping[str, Tensor]:
    """The tensors by their names here: AdapterHub's contain the adapter's name.

    Leaves out an adapted head's own weight, which PEFT also saves: the reader checked that it is the base's.
    """
    if not (is_adapterhub(artifact.config) and is_adapterhub(adapter.config)):
        return {name: value for name, value in artifact.tensors.items() if not name.endswith(_SAVED_ALONG)}
    base = adapter.base
    before, now = (adapter_name(config) for config in (artifact.config, adapter.config))
    own = {
        full_path(base, plain_name(base, name).replace(f".adapters.{before}.", f".adapters.{now}.", 1)): value
        for name, value in artifact.tensors.items()
    }
    head = {
        name.replace(f"heads.{before}.", f"heads.{now}.", 1): value
        for name, value in artifact.head_tensors.items()
    }
    return own | head


def _check_same(ours: LoweredAdapter, theirs: LoweredAdapter) -> None:
    """With the same tensors both must compute the same; otherwise a scale or an activation differs."""
    for wanted, found in zip(_activations(ours), _activations(theirs), strict=True):
        if wanted != found:
            raise SettingError(
                _SETTING, f"a layer of its head has the activation {found}; these settings make {wanted}"
            )
    for mine, other in zip((*ours.deltas, ours.prefix), (*theirs.deltas, theirs.prefix), strict=True):
        if mine is None or other is None:
            continue
        for field in fields(mine):
            here, there = getattr(mine, field.name), getattr(other, field.name, None)
            if not _is_equal(here, there):
                place = f"{site}: " if (site := getattr(mine, "site", None)) is not None else ""
                raise SettingError(
                    _SETTING,
                    f"{place}{field.name} is {_told(there)} there, and {_told(here)} by these settings",
                )


def _activations(adapter: LoweredAdapter) -> list[str | None]:
    """Of its head's layers; without any, both have the base's."""
    return [] if adapter.head is None else [layer.activation for layer in adapter.head.layers]


def _is_equal(here: Any, there: Any) -> bool:
    if isinstance(here, Tensor) and isinstance(there, Tensor):
        return here.shape == there.shape and torch.equal(here.float(), there.float())
    return bool(here == there)


def _told(value: Any) -> str:
    """A number or a name as it is; a tensor's first value."""
    return f"{float(value.flatten()[0]):g}, …" if isinstance(value, Tensor) else str(value)
