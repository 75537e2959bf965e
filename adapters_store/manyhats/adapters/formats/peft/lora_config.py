"""PEFT's ``LoraConfig``, field by field: what changes the maths, what does not, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError, shown
from manyhats.adapters.formats.config_fields import parse_flag
from manyhats.adapters.formats.peft.fields import (
    check_bias_field,
    check_fields,
    parse_alpha,
    parse_rank,
)
from manyhats.adapters.formats.peft.module_patterns import (
    ModulePatterns,
    check_pattern_field,
    compile_patterns,
)
from manyhats.adapters.formats.peft.saved_modules import SAVED_FIELDS

# PEFT's defaults, for configs that leave the field out.
_DEFAULT_RANK = 8
DEFAULT_ALPHA = 8

TARGET_PARAMETERS = "target_parameters"

LORA_FIELDS = SAVED_FIELDS | frozenset(
    (
        "alpha_pattern",
        "bias",
        "corda_config",
        "eva_config",
        "init_lora_weights",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "runtime_config",
        TARGET_PARAMETERS,
        "use_dora",
        "use_rslora",
    )
)
"""Fields that are read, or that change nothing once the adapter is trained."""

LORA_REFUSED = {
    "alora_invocation_tokens": "activated LoRA, which acts on part of the sequence only",
    "layer_replication": "replicated layers, which this base does not have",
    "use_qalora": "QA-LoRA, which pools the input",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA, which changes the base's weights",
    "monteclora_config": "Monte Carlo LoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron's parallel layers",
}
"""Fields that, when set, change what must be computed → what they ask for."""

# These only choose the first values of A and B. Any other initialisation changed the base's weights as well.
_SERVED_INITIALISATIONS = frozenset(("gaussian", "eva", "orthogonal"))


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of the config that determines the maths.

    Attributes:
        rank: R, unless a pattern gives another.
        alpha: unless a pattern gives another.
        use_rslora: scale alpha / √R instead of alpha / R.
        use_dora: every module has a magnitude vector.
        lora_bias: every linear's B has a bias.
        target_parameters: parameters that are no module's ``weight``, such as those of experts, or that of a router:
            each is a path or the end of one.
    """

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    target_parameters: tuple[str, ...]
    rank_pattern: ModulePatterns[int]
    alpha_pattern: ModulePatterns[float]

    def selects_parameter(self, path: str) -> bool:
        """Whether ``target_parameters`` names a parameter."""
        return any(path == name or path.endswith(f".{name}") for name in self.target_parameters)

    def rank_of(self, module: str) -> int:
        """R of one module, by its dotted path."""
        return self.rank_pattern.value_for(module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of one module, by its dotted path."""
        return self.alpha_pattern.value_for(module, self.alpha)


def parse_lora_config(config: Mapping[str, Any]) -> LoraConfig:
    """Read a PEFT LoRA config.

    Raises:
        AdapterUnsupportedError: a field needs something that is not computed here, or is unknown; ``subject`` is the
            field.
        AdapterInvalidError: a field has the wrong type or is out of range.
    """
    check_fields(config, LORA_FIELDS, LORA_REFUSED)
    check_initialisation(config.get("init_lora_weights"))
    check_bias_field(config, "lora_only")
    ranks = check_pattern_field("rank_pattern", config.get("rank_pattern"))
    alphas = check_pattern_field("alpha_pattern", config.get("alpha_pattern"))
    parsed = LoraConfig(
        rank=parse_rank("r", config.get("r", _DEFAULT_RANK)),
        alpha=parse_alpha("lora_alpha", config.get("lora_alpha", DEFAULT_ALPHA)),
        use_rslora=parse_flag("use_rslora", config.get("use_rslora")),
        use_dora=parse_flag("use_dora", config.get("use_dora")),
        lora_bias=parse_flag("lora_bias", config.get("lora_bias")),
        target_parameters=_parse_parameters(config.get(TARGET_PARAMETERS)),
        rank_pattern=compile_patterns(
            "rank_pattern", {k: parse_rank("rank_pattern", v) for k, v in ranks.items()}
        ),
        alpha_pattern=compile_patterns(
            "alpha_pattern", {k: parse_alpha("alpha_pattern", v) for k, v in alphas.items()}
        ),
    )
    if parsed.use_dora and parsed.lora_bias:
        raise AdapterUnsupportedError("lora_bias", "has no meaning with use_dora")
    return parsed


def _parse_parameters(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | None) or not all(isinstance(name, str) for name in value or ()):
        raise AdapterInvalidError(TARGET_PARAMETERS, "must be a list of names")
    return tuple(value or ())


def check_initialisation(value: Any) -> None:
    """Check ``init_lora_weights``.

    Raises:
        AdapterUnsupportedError: it changed the base's weights at creation, or is unknown.
        AdapterInvalidError: it is neither a flag nor a name.
    """
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
