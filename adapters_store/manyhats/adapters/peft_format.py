"""A PEFT directory: ``adapter_config.json`` with ``peft_type``, and ``adapter_model.safetensors``.

AdapterHub's directories are told apart here too, to be refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    shown,
)
from manyhats.adapters.files import SourceDirectory
from manyhats.adapters.safetensors_reader import HOW_TO_CONVERT

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_ADAPTERHUB_WEIGHTS = "adapter.safetensors"
_PICKLES = (
    "adapter_model.bin",
    "pytorch_adapter.bin",
    "adapter_model.pt",
    "adapter_model.pth",
    "pytorch_model.bin",
)
_MAX_LISTED = 10

_SERVED = {"LORA": AdapterMethod.LORA}
_LATER = {
    "ADALORA": "AdaLoRA",
    "VERA": "VeRA",
    "IA3": "IA3",
    "PREFIX_TUNING": "prefix tuning",
    "PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "P-tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
}


def check_directory(directory: SourceDirectory) -> None:
    """Refuse, with what to do about it, a directory that has no config or no safetensors.

    Raises:
        AdapterInvalidError: a file is missing; names subdirectories that look like adapters.
        AdapterUnsafeError: the weights are there as a pickle only.
        AdapterUnsupportedError: there are safetensors files that would not be used.
    """
    names = directory.names()
    if CONFIG_FILE not in names:
        raise AdapterInvalidError(
            CONFIG_FILE, "is missing" + _hint(directory.subdirectories_with(CONFIG_FILE))
        )
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        _refuse_pickles(names)
        raise AdapterInvalidError(WEIGHTS_FILE, "is missing")
    for name in weights:
        if name not in (WEIGHTS_FILE, _ADAPTERHUB_WEIGHTS):
            raise AdapterUnsupportedError(name, f"is not part of a PEFT adapter; only {WEIGHTS_FILE} is read")


def recognise(config: Mapping[str, Any]) -> AdapterMethod:
    """The method of an artifact, by its config.

    Raises:
        AdapterUnsupportedError: a method or format that is not served; names it.
        AdapterInvalidError: it is no adapter's config.
    """
    if "peft_type" not in config:
        _refuse_adapterhub(config)
        raise AdapterInvalidError(CONFIG_FILE, "has no peft_type, so it is not a PEFT adapter's config")
    peft_type = config["peft_type"]
    if not isinstance(peft_type, str):
        raise AdapterInvalidError("peft_type", "must be a name")
    if peft_type in _LATER:
        raise AdapterUnsupportedError("peft_type", f"{_LATER[peft_type]} adapters are not served yet")
    if peft_type not in _SERVED:
        raise AdapterUnsupportedError("peft_type", f"'{shown(peft_type)}' adapters are not served")
    _check_task_type(config.get("task_type"))
    return _SERVED[peft_type]


def recorded_base(config: Mapping[str, Any]) -> str:
    """What a PEFT config names as its base model; empty where it names none.

    Raises:
        AdapterInvalidError: it is no name.
    """
    name = config.get("base_model_name_or_path")
    if name is None:
        return ""
    if not isinstance(name, str) or len(name) > 1024 or not name.isprintable():
        raise AdapterInvalidError(
            "base_model_name_or_path", "must be a name of at most 1024 printable characters"
        )
    return name.strip()


def _check_task_type(task_type: Any) -> None:
    if task_type is None or task_type == "CAUSAL_LM":
        return
    if task_type in ("SEQ_CLS", "TOKEN_CLS"):
        raise AdapterUnsupportedError(
            "task_type", f"{task_type} needs a classification head; only CAUSAL_LM is served"
        )
    raise AdapterUnsupportedError("task_type", f"{shown(str(task_type))} is not served; only CAUSAL_LM is")


def _refuse_adapterhub(config: Mapping[str, Any]) -> None:
    inner = config.get("config")
    if not isinstance(inner, dict) or not ("hidden_size" in config or "model_type" in config):
        return
    # AdapterHub's bottleneck configs are those without an architecture.
    architecture = inner.get("architecture") or "bottleneck"
    if architecture == "lora" and inner.get("composition_mode") == "scale":
        architecture = "IA3"
    raise AdapterUnsupportedError(
        "architecture", f"AdapterHub adapters ({shown(str(architecture))}) are not served yet"
    )


def _refuse_pickles(names: Sequence[str]) -> None:
    for name in names:
        if name in _PICKLES:
            raise AdapterUnsafeError(
                name, f"is a pickle, which can run code when it is read; {HOW_TO_CONVERT}"
            )


def _hint(subdirectories: Sequence[str]) -> str:
    if not subdirectories:
        return ""
    listed = ", ".join(shown(name) for name in subdirectories[:_MAX_LISTED])
    return f"; these subdirectories look like adapters, register one of them: {listed}"
