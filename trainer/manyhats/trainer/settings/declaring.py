"""What the declarations of all training settings share: words, bounds, titles."""

from __future__ import annotations

from typing import Any

from manyhats.settings.declaration import setting
from manyhats.settings.reading import Wording
from manyhats.trainer.errors import SettingError

LARGEST = 2**31 - 1
"""The upper bound of every whole number: sensible values are smaller, and libraries count in 32 bits."""

WORDING = Wording(error=SettingError)

GROUPS = (
    RUN := "Task and output",
    DATA := "Data",
    HEAD := "Head",
    LORA := "lora, qlora, dora",
    IA3 := "ia3",
    BOTTLENECK := "bottleneck",
    VIRTUAL := "prefix, prompt, ptuning",
    MODEL := "Base model",
    STEPS := "Optimization",
    WATCH := "Evaluation and checkpoints",
)
"""The titles under which settings are shown, in this order."""


def require(is_right: bool, setting: str, message: str) -> None:
    """Refuse a setting that conflicts with others.

    Raises:
        SettingError: it is not right.
    """
    if not is_right:
        raise SettingError(setting, message)


def whole(default: int | None, at_least: int, **declared: Any) -> Any:
    """A field that is a setting and a whole number; see ``setting``."""
    return setting(default, at_least=at_least, at_most=LARGEST, **declared)
