"""IA3: trained factors on the outputs of some linears and on the inputs of others, in PEFT's layout.

Source: Liu et al. 2022 (arXiv:2205.05638).
"""

from __future__ import annotations

import torch
from torch import nn

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.formats.peft.tensors import PREFIX
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.errors import SettingError
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.methods.peft_config import peft_config
from manyhats.trainer.methods.targets import ChosenModules, choose_modules
from manyhats.trainer.settings.methods import Ia3Settings

_VECTOR = "ia3_l"


def make_ia3(settings: Ia3Settings, model: LoadedModel) -> ParametrizedAdapter:
    """A fresh IA3: ones.

    Raises:
        SettingError: a module is not in the base, is the head, or is in both lists.
    """
    outputs = _choose(settings.output_modules, "output_modules", model)
    inputs = _choose(settings.input_modules, "input_modules", model)
    both = {target.module for target in outputs.targets} & {target.module for target in inputs.targets}
    if both:
        raise SettingError("input_modules", f"{min(both)} is also in output_modules")
    # PEFT tells the two apart by shape: output factors are a column, input factors a row.
    parameters = {
        **{_name(target.module): _ones(target.d_out, 1) for target in outputs.targets},
        **{_name(target.module): _ones(1, target.d_in) for target in inputs.targets},
    }
    own = {
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "feedforward_modules": list(inputs.names),
        "init_ia3_weights": True,
        "target_modules": sorted({*outputs.names, *inputs.names}),
    }
    return ParametrizedAdapter(
        method=AdapterMethod.IA3,
        config=peft_config("IA3", model, own),
        parameters=parameters,
        base=model.description,
    )


def _choose(names: tuple[str, ...], setting: str, model: LoadedModel) -> ChosenModules:
    chosen = choose_modules(names, setting, model.description)
    if any(target.is_head for target in chosen.targets):
        raise SettingError(setting, "the head cannot be rescaled: that is not served")
    return chosen


def _name(module: str) -> str:
    return f"{PREFIX}{module}.{_VECTOR}"


def _ones(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))
