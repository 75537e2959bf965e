"""PEFT's ``LoraConfig``, field by field: what changes the maths, what does not, what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError, shown
from manyhats.adapters.module_patterns import ModulePatterns, check_pattern_field, compile_patterns

# PEFT's own defaults, for configs that leave the field out.
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8
_MAX_ALPHA = 1e6

# Fields that say how it was trained, or what the tensors say better, or that hold for any PEFT method.
_HARMLESS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "runtime_config",
        "ensure_weight_tying",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    )
)
_READ = frozenset(
    ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias")
)

# Fields that, when set, change what must be computed → what they ask for.
_REFUSED = {
    "use_dora": "DoRA, which is not served yet",
    "lora_bias": "a bias of lora_B, which is not served yet",
    "modules_to_save": "whole trained modules, which are not served yet",
    "trainable_token_indices": "trained token embeddings, which are not served yet",
    "alora_invocation_tokens": "activated LoRA, which acts on part of the sequence only",
    "layer_replication": "replicated layers, a base with other layers than this one",
    "target_parameters": "LoRA on bare parameters (experts)",
    "fan_in_fan_out": "transposed base weights",
    "use_qalora": "QA-LoRA, which pools the input",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA, which changes the base's weights",
    "monteclora_config": "Monte Carlo LoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron's parallel layers",
}

# These only choose the first values of A and B. Any other initialisation changed the base's weights as well.
_SERVED_INITIALISATIONS = frozenset(("gaussian", "eva", "orthogonal"))


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What of the config decides the maths.

    Attributes:
        rank: R, unless a pattern gives another.
        alpha: unless a pattern gives another.
        use_rslora: scale alpha / √R in place of alpha / R.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: ModulePatterns[int]
    alpha_pattern: ModulePatterns[float]

    def rank_of(self, module: str) -> int:
        """R of one module, by its dotted path."""
        return self.rank_pattern.value_for(module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of one module, by its dotted path."""
        return self.alpha_pattern.value_for(module, self.alpha)


def parse_lora_config(config: Mapping[str, Any]) -> LoraConfig:
    """Read a PEFT LoRA config.

    Raises:
        AdapterUnsupportedError: a field asks for what is not computed here, or is unknown; ``subject`` is the
            field.
        AdapterInvalidError: a field has the wrong type or is out of range.
    """
    _refuse_unserved_fields(config)
    _check_initialisation(config.get("init_lora_weights"))
    if config.get("bias", "none") not in ("none", "all", "lora_only", None):
        raise AdapterInvalidError("bias", "must be none, all or lora_only")
    ranks = check_pattern_field("rank_pattern", config.get("rank_pattern"))
    alphas = check_pattern_field("alpha_pattern", config.get("alpha_pattern"))
    return LoraConfig(
        rank=_parse_rank("r", config.get("r", _DEFAULT_RANK)),
        alpha=_parse_alpha("lora_alpha", config.get("lora_alpha", _DEFAULT_ALPHA)),
        use_rslora=_parse_flag("use_rslora", config.get("use_rslora", False)),
        rank_pattern=compile_patterns(
            "rank_pattern", {k: _parse_rank("rank_pattern", v) for k, v in ranks.items()}
        ),
        alpha_pattern=compile_patterns(
            "alpha_pattern", {k: _parse_alpha("alpha_pattern", v) for k, v in alphas.items()}
        ),
    )


def _refuse_unserved_fields(config: Mapping[str, Any]) -> None:
    for field, value in config.items():
        if field in _READ or field in _HARMLESS or _is_blank(value):
            continue
        if field in _REFUSED:
            raise AdapterUnsupportedError(field, f"asks for {_REFUSED[field]}")
        raise AdapterUnsupportedError(field, "is not a field this server knows; it may change the maths")


def _is_blank(value: Any) -> bool:
    """Null, false or empty: the field is not in use."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _check_initialisation(value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str):
        raise AdapterInvalidError("init_lora_weights", "must be true, false or a name")
    if value.lower() not in _SERVED_INITIALISATIONS:
        raise AdapterUnsupportedError(
            "init_lora_weights",
            f"'{shown(value)}' changed the base model's weights, or is unknown; "
            "save the adapter converted to plain LoRA (PEFT: path_initial_model_for_weight_conversion)",
        )


def _parse_rank(field: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise AdapterInvalidError(field, f"a rank is a whole number from 1, not {shown(str(value))}")
    return value


def _parse_alpha(field: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > _MAX_ALPHA:
        raise AdapterInvalidError(field, f"alpha is a number up to {_MAX_ALPHA:g}, not {shown(str(value))}")
    return float(value)


def _parse_flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool | None):
        raise AdapterInvalidError(field, "must be true or false")
    return bool(value)
