"""LoRA: a trained low-rank update of linears, in PEFT's layout. QLoRA is the same over an NF4 base.

Source: Hu et al. 2021 (arXiv:2106.09685); Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator, nn

from manyhats.adapters.errors import AdapterError
from manyhats.adapters.formats.peft.lora_tensors import A, B
from manyhats.adapters.formats.peft.module_patterns import compile_patterns
from manyhats.adapters.formats.peft.tensors import PREFIX, Target
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.sites import BaseDescription
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.errors import SettingError
from manyhats.trainer.methods.initialization import kaiming_uniform, zeros
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.methods.peft_config import peft_config, plain_number
from manyhats.trainer.methods.targets import ChosenModules, choose_modules
from manyhats.trainer.settings.methods import LoraSettings

# As PEFT counts it; the server refuses larger ones.
_MAX_ALPHA = 1e6


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Settings checked against the base.

    Attributes:
        chosen: the modules.
        ranks: of each of them, by its path.
    """

    chosen: ChosenModules
    ranks: Mapping[str, int]


def make_lora(
    settings: LoraSettings, model: LoadedModel, generator: Generator, limits: AdapterLimits
) -> ParametrizedAdapter:
    """A fresh LoRA: A by Kaiming's bound, B zero, so that it changes nothing yet.

    Raises:
        SettingError: a module, a rank, an alpha or a pattern that does not fit.
    """
    plan = plan_lora(settings, model.description, limits)
    return low_rank_adapter(settings, plan, model, low_rank_parameters(plan, generator))


def low_rank_adapter(
    settings: LoraSettings, plan: LoraPlan, model: LoadedModel, parameters: dict[str, nn.Parameter]
) -> ParametrizedAdapter:
    """LoRA or DoRA, as the settings say, from its parameters."""
    return ParametrizedAdapter(
        method=settings.method,
        config=lora_config(settings, plan.chosen, model),
        parameters=parameters,
        base=model.description,
        dropout=settings.dropout,
        learning_rate_scales=lora_plus_scales(settings, parameters),
    )


def plan_lora(settings: LoraSettings, base: BaseDescription, limits: AdapterLimits) -> LoraPlan:
    """Check the settings against the base.

    Raises:
        SettingError: names the setting.
    """
    chosen = choose_modules(settings.target_modules, "target_modules", base)
    modules = [target.module for target in chosen.targets]
    _check_ranks(settings, limits)
    for setting, alpha in (("alpha", settings.alpha), *_alphas(settings)):
        if not (math.isfinite(alpha) and 0 < alpha <= _MAX_ALPHA):
            raise SettingError(setting, f"must be above 0 and at most {_MAX_ALPHA:g}, not {alpha:g}")
    _check_pattern("rank_pattern", settings.rank_pattern, modules)
    _check_pattern("alpha_pattern", settings.alpha_pattern, modules)
    ranks = compile_patterns("rank_pattern", settings.rank_pattern)
    return LoraPlan(chosen, {module: ranks.value_for(module, settings.rank) for module in modules})


def low_rank_parameters(plan: LoraPlan, generator: Generator) -> dict[str, nn.Parameter]:
    """A [R, d_in] and B [d_out, R] of every module, by the names PEFT saves them under."""
    parameters: dict[str, nn.Parameter] = {}
    for target in plan.chosen.targets:
        rank = plan.ranks[target.module]
        parameters[tensor_name(target, A)] = kaiming_uniform(rank, target.d_in, generator)
        parameters[tensor_name(target, B)] = zeros(target.d_out, rank)
    return parameters


def tensor_name(target: Target, suffix: str) -> str:
    """PEFT's name for a tensor of a module."""
    return f"{PREFIX}{target.module}.{suffix}"


def lora_plus_scales(settings: LoraSettings, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """LoRA+: the learning rate of every B is ``lora_plus_ratio`` times that of A.

    Source: Hayou et al. 2024 (arXiv:2402.12354), section 5.
    """
    return {name: settings.lora_plus_ratio for name in parameters if name.endswith(f".{B}")}


def lora_config(settings: LoraSettings, chosen: ChosenModules, model: LoadedModel) -> dict[str, Any]:
    """PEFT's ``LoraConfig``; patterns keep their order, since the first matching key counts."""
    own = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {key: plain_number(alpha) for key, alpha in settings.alpha_pattern.items()},
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": plain_number(settings.alpha),
        "lora_bias": False,
        "lora_dropout": settings.dropout,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "r": settings.rank,
        "rank_pattern": dict(settings.rank_pattern),
        "target_modules": list(chosen.names),
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": settings.use_dora,
        "use_qalora": False,
        "use_rslora": settings.use_rslora,
        "velora_config": None,
    }
    return peft_config("LORA", model, own)


def _alphas(settings: LoraSettings) -> list[tuple[str, float]]:
    return [("alpha_pattern", alpha) for alpha in settings.alpha_pattern.values()]


def _check_ranks(settings: LoraSettings, limits: AdapterLimits) -> None:
    ranks = (("rank", settings.rank), *(("rank_pattern", rank) for rank in settings.rank_pattern.values()))
    for setting, rank in ranks:
        if rank > limits.max_rank:
            raise SettingError(setting, f"is {rank}; the limit is {limits.max_rank}")


def _check_pattern(setting: str, pattern: Mapping[str, float], modules: Sequence[str]) -> None:
    """Check that every key decides for some module: PEFT takes the first key that matches."""
    order = {key: index for index, key in enumerate(pattern)}
    try:
        first = compile_patterns(setting, order)
        used = {first.value_for(module, -1) for module in modules}
        for key, index in order.items():
            if index in used:
                continue
            alone = compile_patterns(setting, {key: 1})
            if any(alone.value_for(module, 0) for module in modules):
                raise SettingError(setting, f"{key!r} has no effect after the keys before it; put it first")
            raise SettingError(setting, f"{key!r} matches none of the trained modules")
    except AdapterError as error:
        raise SettingError(setting, error.description) from error
