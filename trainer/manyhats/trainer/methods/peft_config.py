"""The fields that every ``adapter_config.json`` of PEFT has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manyhats.engine.checkpoints.loader import LoadedModel

_PEFT_VERSION = "0.21.2"


def peft_config(peft_type: str, model: LoadedModel, own: Mapping[str, Any]) -> dict[str, Any]:
    """A config as PEFT 0.21 saves it, with sorted keys.

    Args:
        peft_type: PEFT's name for the method.
        model: the base.
        own: the method's own fields.
    """
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": model.reference,
        "inference_mode": True,
        "modules_to_save": None,
        "peft_type": peft_type,
        "peft_version": _PEFT_VERSION,
        "revision": None,
        "task_type": "CAUSAL_LM",
    }
    return dict(sorted({**common, **own}.items()))


def plain_number(value: float) -> float:
    """The number as an int if it is whole, PEFT's own type for alpha."""
    return int(value) if value == int(value) else value
