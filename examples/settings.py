"""The adapter of an example task: the trainer's own settings, and those of what is trained with PEFT."""

from __future__ import annotations

from dataclasses import dataclass

from manyhats.adapters.artifact import AdapterMethod
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLoraSettings:
    """AdaLoRA: each linear begins with the initial rank; in all, the target rank is left on average."""

    initial_rank: int
    target_rank: int
    alpha: int
    target_modules: tuple[str, ...]
    method = AdapterMethod.ADALORA


@dataclass(frozen=True, slots=True, kw_only=True)
class VeraSettings:
    """VeRA: rank R of the shared random projections, which are saved along."""

    rank: int
    target_modules: tuple[str, ...]
    method = AdapterMethod.VERA


@dataclass(frozen=True, slots=True, kw_only=True)
class MultitaskSettings:
    """Multitask prompt tuning of one task: P virtual tokens, begun as a text's embeddings, and a factor of rank R."""

    num_virtual_tokens: int
    text: str
    rank: int
    method = AdapterMethod.MULTITASK_PROMPT_TUNING


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOverSettings:
    """Prompt tuning on top of the LoRA of another task, ``over``: P virtual tokens, begun as a text's embeddings."""

    num_virtual_tokens: int
    text: str
    over: str
    method = AdapterMethod.PROMPT_TUNING


PeftSettings = AdaLoraSettings | VeraSettings | MultitaskSettings | PromptOverSettings
ExampleSettings = AdapterSettings | PeftSettings


def describe(settings: ExampleSettings) -> str:
    """What a model card says of an adapter, in a few words."""
    match settings:
        case LoraSettings():
            name = "DoRA" if settings.use_dora else "LoRA"
            rslora = " (rsLoRA)" if settings.use_rslora else ""
            return f"{name} r={settings.rank}, alpha={settings.alpha:g}{rslora} on {_code(settings.target_modules)}"
        case AdaLoraSettings():
            ranks = f"init_r={settings.initial_rank}, target_r={settings.target_rank}"
            return f"AdaLoRA {ranks}, alpha={settings.alpha} on {_code(settings.target_modules)}"
        case VeraSettings():
            return f"VeRA r={settings.rank} on {_code(settings.target_modules)}, projections saved"
        case Ia3Settings():
            outputs, inputs = _code(settings.output_modules), _code(settings.input_modules)
            return f"IA3 on the outputs of {outputs} and the inputs of {inputs}"
        case BottleneckSettings():
            factor = settings.reduction_factor
            return f"bottleneck ({settings.variant}), reduction factor {factor}, {settings.non_linearity}"
        case PrefixSettings():
            size = settings.num_virtual_tokens
            return f"prefix tuning, P={size}, through a projection of {settings.projection_size}"
        case PTuningSettings():
            return f"P-tuning, P={settings.num_virtual_tokens}, by an MLP of {settings.encoder_size}"
        case PromptSettings():
            return f"prompt tuning, P={settings.num_virtual_tokens}, begun as “{settings.init_text}”"
        case PromptOverSettings():
            begun = f"P={settings.num_virtual_tokens}, begun as “{settings.text}”"
            return f"prompt tuning, {begun}, trained over `{settings.over}`"
        case MultitaskSettings():
            shape = f"P={settings.num_virtual_tokens}, rank {settings.rank}"
            return f"multitask prompt tuning of one task, {shape}, begun as “{settings.text}”"


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
