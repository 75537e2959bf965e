"""A PEFT directory: ``adapter_config.json`` with ``peft_type``, and ``adapter_model.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.disk.files import SourceDirectory
from manyhats.adapters.errors import (
    HOW_TO_CONVERT,
    AdapterInvalidError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    shown,
)
from manyhats.adapters.formats.adapterhub import format as adapterhub_format

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_NAME_KEY = "base_model_name_or_path"

PICKLES = (
    "adapter_model.bin",
    "pytorch_adapter.bin",
    "adapter_model.pt",
    "adapter_model.pth",
    "pytorch_model.bin",
)
_MAX_LISTED = 10

# A LORA config with use_dora means DORA.
_PEFT_TYPES: Mapping[str, AdapterMethod] = MappingProxyType(
    {
        "LORA": AdapterMethod.LORA,
        "ADALORA": AdapterMethod.ADALORA,
        "VERA": AdapterMethod.VERA,
        "IA3": AdapterMethod.IA3,
        "PREFIX_TUNING": AdapterMethod.PREFIX_TUNING,
        "CARTRIDGE": AdapterMethod.PREFIX_TUNING,
        "PROMPT_TUNING": AdapterMethod.PROMPT_TUNING,
        "P_TUNING": AdapterMethod.P_TUNING,
        "MULTITASK_PROMPT_TUNING": AdapterMethod.MULTITASK_PROMPT_TUNING,
        "TRAINABLE_TOKENS": AdapterMethod.TRAINABLE_TOKENS,
    }
)
_REFUSED_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "ADAPTION_PROMPT": "adaption prompts attend to their tokens separately, through a gate of their "
        "own; neither a delta nor a KV prefix can do that",
        "CPT": "context-aware prompt tuning is not served",
    }
)
_TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def check_directory(directory: SourceDirectory) -> None:
    """Refuse, with what to do about it, a directory that has no config or no safetensors.

    Raises:
        AdapterInvalidError: a file is missing; names subdirectories that look like adapters.
        AdapterUnsafeError: the weights exist only as a pickle.
        AdapterUnsupportedError: there are safetensors files that would not be used.
    """
    names = directory.names()
    if CONFIG_FILE not in names:
        raise AdapterInvalidError(
            CONFIG_FILE, "is missing" + _hint(directory.subdirectories_with(CONFIG_FILE))
        )
    check_names(names)


def check_names(names: Sequence[str]) -> None:
    """Refuse a directory by its entries, before anything is read.

    Raises:
        AdapterInvalidError, AdapterUnsafeError, AdapterUnsupportedError: as ``check_directory``.
    """
    if CONFIG_FILE not in names:
        raise AdapterInvalidError(CONFIG_FILE, "is missing")
    tensors = [name for name in names if name.endswith(".safetensors")]
    weights = [name for name in tensors if name != adapterhub_format.HEAD_WEIGHTS_FILE]
    if not weights:
        _refuse_pickles(names)
        raise AdapterInvalidError(WEIGHTS_FILE, "is missing")
    adapterhub_format.check_companions(weights)
    for name in weights:
        if name not in (WEIGHTS_FILE, adapterhub_format.WEIGHTS_FILE):
            raise AdapterUnsupportedError(
                name,
                f"is not part of an adapter; only {WEIGHTS_FILE} or {adapterhub_format.WEIGHTS_FILE} is read",
            )


def recognise(config: Mapping[str, Any]) -> AdapterMethod:
    """The method of an artifact, by its config.

    Raises:
        AdapterUnsupportedError: a method or format that is not served; names it.
        AdapterInvalidError: it is not an adapter's config.
    """
    if "peft_type" not in config:
        raise AdapterInvalidError(CONFIG_FILE, "has neither PEFT's peft_type nor AdapterHub's config")
    peft_type = config["peft_type"]
    if not isinstance(peft_type, str):
        raise AdapterInvalidError("peft_type", "must be a name")
    if peft_type not in _PEFT_TYPES:
        reason = _REFUSED_TYPES.get(peft_type, f"'{shown(peft_type)}' adapters are not served")
        raise AdapterUnsupportedError("peft_type", reason)
    _check_task_type(config.get("task_type"))
    if peft_type == "LORA" and config.get("use_dora") is True:
        return AdapterMethod.DORA
    return _PEFT_TYPES[peft_type]


def _check_task_type(task_type: Any) -> None:
    if task_type is None or task_type in _TASK_TYPES:
        return
    raise AdapterUnsupportedError(
        "task_type", f"{shown(str(task_type))} is not served; these are: {', '.join(_TASK_TYPES)}"
    )


def _refuse_pickles(names: Sequence[str]) -> None:
    for name in names:
        if name in PICKLES:
            raise AdapterUnsafeError(
                name, f"is a pickle, which can run code when it is read; {HOW_TO_CONVERT}"
            )


def _hint(subdirectories: Sequence[str]) -> str:
    if not subdirectories:
        return ""
    listed = ", ".join(shown(name) for name in subdirectories[:_MAX_LISTED])
    num_more = len(subdirectories) - _MAX_LISTED
    more = f" and {num_more} more" if num_more > 0 else ""
    return f"; these subdirectories look like adapters; register one of them: {listed}{more}"
