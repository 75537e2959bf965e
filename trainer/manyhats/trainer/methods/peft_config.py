"""What every ``adapter_config.json`` of PEFT holds, and the name that an artifact calls its base by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from manyhats.engine.model.loader import LoadedModel

_PEFT_VERSION = "0.21.2"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")


def base_name(model: LoadedModel) -> str:
    """A name that the base is known by: a hub id if it has one, which says most elsewhere."""
    hub_ids = sorted(name for name in model.description.names if _HUB_ID.fullmatch(name))
    return hub_ids[0] if hub_ids else model.name


def peft_config(peft_type: str, model: LoadedModel, own: Mapping[str, Any]) -> dict[str, Any]:
    """A config as PEFT 0.21 saves it, its keys sorted.

    Args:
        peft_type: PEFT's name of the method.
        model: the base.
        own: the method's own fields.
    """
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        "modules_to_save": None,
        "peft_type": peft_type,
        "peft_version": _PEFT_VERSION,
        "revision": None,
        "task_type": "CAUSAL_LM",
    }
    return dict(sorted({**common, **own}.items()))


def plain_number(value: float) -> float:
    """The number as an int if it is whole: PEFT's own type for alpha."""
    return int(value) if value == int(value) else value
