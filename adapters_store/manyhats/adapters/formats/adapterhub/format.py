"""An AdapterHub directory: ``adapter_config.json`` with ``config`` inside, and ``adapter.safetensors``.

Read as ``adapters`` 1.3.0 reads it, including its corrections of older versions. The library's own default is a pickle,
``pytorch_adapter.bin``; that is never read here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterUnsupportedError,
    BaseMismatchError,
    shown,
)
from manyhats.adapters.sites import BaseDescription

WEIGHTS_FILE = "adapter.safetensors"
PICKLE_FILE = "pytorch_adapter.bin"
HEAD_CONFIG_FILE = "head_config.json"
HEAD_WEIGHTS_FILE = "model_head.safetensors"
HEAD_PICKLE_FILE = "pytorch_model_head.bin"
HEAD_FILES = (HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE)
"""A head that was saved beside an adapter: both, or neither."""
BASE_NAME_KEY = "model_name"

# What else the library writes alongside an adapter → what it is.
COMPANIONS: Mapping[str, str] = MappingProxyType(
    {
        "adapter_fusion_config.json": "AdapterFusion",
        "model_adapter_fusion.safetensors": "AdapterFusion",
        "pytorch_model_adapter_fusion.bin": "AdapterFusion",
        "adapter_setup.json": "a composition of several adapters",
    }
)
_UNSERVED: Mapping[str, str] = MappingProxyType(
    {
        "mtl_lora": "multi-task LoRA",
    }
)
# Before versions were recorded, these names meant other functions.
_RENAMED_ACTIVATIONS: Mapping[str, str] = MappingProxyType({"gelu": "gelu_new", "gelu_orig": "gelu"})
_VERSION = re.compile(r"adapters\.(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(.*)")
_PRE_RELEASE = re.compile(r"[._-]?(?:a|b|c|rc|alpha|beta|pre|preview|dev)[._-]?\d*.*")
_LORA_SCALE_FIXED = (1, 1, 0)


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is AdapterHub's: the adapter's own config is an object inside it."""
    return "peft_type" not in config and isinstance(config.get("config"), dict)


def check_companions(names: Collection[str]) -> None:
    """Refuse a directory that holds more than the adapter and its head; without the rest, its output would differ.

    Raises:
        AdapterUnsupportedError: names the file.
    """
    for name, what in COMPANIONS.items():
        if name in names:
            raise AdapterUnsupportedError(
                name,
                f"is {what} saved alongside, which is not served; save the adapter alone, or remove the file if it "
                "was not trained",
            )
    for name, other in (HEAD_FILES, HEAD_FILES[::-1], (HEAD_PICKLE_FILE, HEAD_WEIGHTS_FILE)):
        if name in names and other not in names:
            raise AdapterUnsupportedError(
                name,
                f"is a head without {other}, so it cannot be used; save it as safetensors (save_adapter with "
                "use_safetensors=True, or manyhats adapters convert), or the adapter alone (with_head=False)",
            )


def recognise(config: Mapping[str, Any]) -> AdapterMethod:
    """The method of an AdapterHub artifact, by its config.

    Raises:
        AdapterUnsupportedError: a method that is not served; names it.
        AdapterInvalidError: the config contradicts the format.
    """
    inner = config["config"]
    architecture = inner.get("architecture")
    if architecture is None or architecture == "bottleneck":
        return AdapterMethod.BOTTLENECK
    if architecture == "prefix_tuning":
        return AdapterMethod.PREFIX_TUNING
    if architecture == "reft":
        return AdapterMethod.REFT
    if architecture == "union":
        return AdapterMethod.UNION
    if architecture == "prompt_tuning":
        return AdapterMethod.PROMPT_TUNING
    if architecture == "lora":
        return AdapterMethod.IA3 if inner.get("composition_mode") == "scale" else AdapterMethod.LORA
    if not isinstance(architecture, str):
        raise AdapterInvalidError("architecture", "must be a name")
    what = _UNSERVED.get(architecture, f"'{shown(architecture)}'")
    raise AdapterUnsupportedError("architecture", f"asks for {what}, which is not served")


def check_base(config: Mapping[str, Any], base: BaseDescription) -> None:
    """Compare what the config says about its base with the resident one.

    Raises:
        BaseMismatchError: another model type or hidden size.
    """
    for key, own in (("model_type", base.model_type), ("hidden_size", base.hidden_size)):
        recorded = config.get(key)
        if recorded is not None and recorded != own:
            raise BaseMismatchError(
                key, f"was made for '{shown(str(recorded))}', and this server's base has '{own}'"
            )


def adapter_name(config: Mapping[str, Any]) -> str:
    """The name that the adapter has in its tensors' names.

    Raises:
        AdapterInvalidError: there is none, or it is not a single component of a dotted name.
    """
    name = config.get("name")
    if not isinstance(name, str) or not name or "." in name or len(name) > 256:
        raise AdapterInvalidError("name", "must be the adapter's name, without dots")
    return name


def method_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The adapter's own config, corrected for its version as the library does on loading.

    Raises:
        AdapterInvalidError: the version cannot be read.
    """
    inner = dict(config["config"])
    version = config.get("version")
    if version is None:
        activation = inner.get("non_linearity")
        if isinstance(activation, str):
            inner["non_linearity"] = _RENAMED_ACTIVATIONS.get(activation, activation)
    elif not isinstance(version, str):
        raise AdapterInvalidError("version", "must be text")
    # Versions before 1.1 did not scale; the library says so by giving alpha the value of r.
    if _is_before_lora_fix(version) and inner.get("architecture") == "lora" and "r" in inner:
        inner["alpha"] = inner["r"]
    return inner


def _is_before_lora_fix(version: str | None) -> bool:
    """``adapters.1.0.1`` is; another library's version (``adapter-transformers``' have no prefix) is not."""
    if version is None or not version.startswith("adapters."):
        return False
    match = _VERSION.fullmatch(version)
    if match is None:
        raise AdapterInvalidError("version", f"'{shown(version)}' is not a version of adapters")
    release = (int(match[1]), int(match[2]), int(match[3] or 0))
    is_pre_release = _PRE_RELEASE.fullmatch(match[4]) is not None
    return release < _LORA_SCALE_FIXED or (release == _LORA_SCALE_FIXED and is_pre_release)
