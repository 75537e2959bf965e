"""What the declarations of all settings of a training share: words, bounds, titles."""

from __future__ import annotations

from typing import Any

from manyhats.settings.declaration import setting
from manyhats.settings.reading import Wording
from manyhats.trainer.errors import SettingError

LARGEST = 2**31 - 1
"""Of every whole number: what can be meant is smaller, and libraries count in 32 bits."""

WORDING = Wording(error=SettingError)

GROUPS = (
    RUN := "What is trained, and where it goes",
    DATA := "Data",
    LORA := "lora, qlora, dora",
    IA3 := "ia3",
    BOTTLENECK := "bottleneck",
    VIRTUAL := "prefix, prompt, ptuning",
    MODEL := "Base model",
    STEPS := "Optimization",
    WATCH := "Evaluation and checkpoints",
)
"""The titles that settings are shown under, in this order."""


def require(is_right: bool, setting: str, message: str) -> None:
    """Refuse a setting that goes with others as it must not.

    Raises:
        SettingError: it is not right.
    """
    if not is_right:
        raise SettingError(setting, message)


def whole(default: int | None, at_least: int, **declared: Any) -> Any:
    """A field that is a setting and a whole number; see ``setting``."""
    return setting(default, at_least=at_least, at_most=LARGEST, **declared)
