"""Each method's default peak learning rate, for AdamW.

Chosen on the default model by the held-out loss of one small task after 30 to 40 steps of 8 rows each. LoRA still
trained well at 2e-3, the bottlenecks at 3e-3 and IA3 at 5e-2; a projected prefix diverged at 5e-3.
"""

from __future__ import annotations

import math

from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)


def default_learning_rate(settings: AdapterSettings) -> float:
    """The peak learning rate if the user gives none.

    With LoRA+ it is A's, and LoRA's is the geometric mean of A's and B's rates.
    """
    match settings:
        case LoraSettings():
            return 1e-3 / math.sqrt(settings.lora_plus_ratio)
        case BottleneckSettings():
            return 2e-3
        case PrefixSettings():
            # Without the MLP the keys and values themselves must move, starting from a standard normal distribution.
            return 1e-3 if settings.projection_size else 3e-2
        case PTuningSettings():
            return 3e-3
        case PromptSettings():
            return 1e-2
        case Ia3Settings():
            return 2e-2
