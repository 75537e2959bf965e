"""A union of AdapterHub's: several configs in one directory, whose tensors lie side by side in one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError, shown
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.adapterhub.tensors import refuse_tensor

_MAX_PARTS = 16
_BOTTLENECK = "bottleneck"
# Architecture → what precedes the adapter's name in the names of its tensors.
_HOLDERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        _BOTTLENECK: ("adapters", "shared_parameters", "invertible_adapters"),
        "lora": ("loras",),
        "prefix_tuning": ("prefix_tunings", "prefix_gates"),
        "prompt_tuning": ("prompt_tunings",),
        "reft": ("refts",),
    }
)


def split(config: Mapping[str, Any], names: Iterable[str]) -> list[tuple[dict[str, Any], frozenset[str]]]:
    """The union's parts: each config as if it were saved alone, and the names of its tensors.

    Args:
        config: the parsed ``adapter_config.json``.
        names: of the file's tensors.

    Raises:
        AdapterUnsupportedError: two parts are of one architecture, or one is none that is served.
        AdapterInvalidError: it is no list of configs, or a tensor belongs to none of them.
    """
    parts: dict[str, tuple[dict[str, Any], set[str]]] = {}
    for inner in _inner_configs(config):
        part = {**config, "config": inner}
        adapterhub_format.recognise(part)
        architecture = str(inner.get("architecture") or _BOTTLENECK)
        if architecture not in _HOLDERS:
            raise AdapterUnsupportedError("configs", f"has '{shown(architecture)}', which no union may have")
        if architecture in parts:
            raise AdapterUnsupportedError(
                "configs", f"has two of '{architecture}'; a union is served with one of each"
            )
        parts[architecture] = part, set()
    name = adapterhub_format.adapter_name(config)
    for tensor in names:
        parts[_architecture_of(tensor, name, parts)][1].add(tensor)
    return [(part, frozenset(own)) for part, own in parts.values()]


def _inner_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = config["config"]
    configs = inner.get("configs")
    if not isinstance(configs, list) or not 1 <= len(configs) <= _MAX_PARTS:
        raise AdapterInvalidError("configs", f"must be a list of 1 to {_MAX_PARTS} configs")
    if not all(isinstance(each, dict) for each in configs):
        raise AdapterInvalidError("configs", "must be a list of objects")
    for key in inner:
        if key not in ("architecture", "configs"):
            raise AdapterUnsupportedError(key, "is not a field of a union that this server knows")
    return configs


def _architecture_of(tensor: str, name: str, parts: Mapping[str, Any]) -> str:
    for architecture in parts:
        if any(f".{holder}.{name}." in f".{tensor}" for holder in _HOLDERS[architecture]):
            return architecture
    return refuse_tensor(tensor)
