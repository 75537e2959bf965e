"""DoRA: LoRA, plus a trained length for each row of the updated weight, in PEFT's layout.

The rows' own lengths are constants in training (section 4.3 of the paper): the server's ``lower``, which training also
runs, passes no gradient through them.

Source: Liu et al. 2024 (arXiv:2402.09353).
"""

from __future__ import annotations

import torch
from torch import Generator, nn

from manyhats.adapters.formats.peft.lora_tensors import MAGNITUDE
from manyhats.adapters.formats.peft.tensors import Target
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.sites import WeightSource
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.errors import BaseError, SettingError
from manyhats.trainer.methods.lora import (
    LoraPlan,
    low_rank_adapter,
    low_rank_parameters,
    plan_lora,
    tensor_name,
)
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.settings.methods import LoraSettings


def make_dora(
    settings: LoraSettings, model: LoadedModel, generator: Generator, limits: AdapterLimits
) -> ParametrizedAdapter:
    """A fresh DoRA: a fresh LoRA, and the lengths of the base's own rows.

    Raises:
        SettingError: as for LoRA; or the head is among the modules.
        BaseError: the base's weights are not available.
    """
    plan = plan_lora(settings, model.description, limits)
    for target in plan.chosen.targets:
        if target.is_head:
            raise SettingError(
                "target_modules", "only LoRA can be trained on the head; DoRA is not served there"
            )
    parameters = low_rank_parameters(plan, generator) | _magnitudes(plan, model)
    return low_rank_adapter(settings, plan, model, parameters)


def _magnitudes(plan: LoraPlan, model: LoadedModel) -> dict[str, nn.Parameter]:
    weights = model.description.weights
    if weights is None:
        raise BaseError("DoRA starts from the lengths of the base's rows; its weights are not available")
    return {
        tensor_name(target, MAGNITUDE): nn.Parameter(_row_lengths(target, weights))
        for target in plan.chosen.targets
    }


def _row_lengths(target: Target, weights: WeightSource) -> torch.Tensor:
    """‖W‖₂ of each row of a module, dequantized: [d_out]."""
    return torch.cat(
        [torch.linalg.vector_norm(weights.linear(part.site)[0].cpu(), dim=1) for part in target.parts]
    )
