"""How the adapter of an example task is made: one kind of settings per method, and those of the training itself."""

from __future__ import annotations

from dataclasses import dataclass

from manyhats.adapters.artifact import AdapterMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """LoRA, or DoRA: rank R, alpha, the linears it acts on, and whether its scale is alpha / √R."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def method(self) -> AdapterMethod:
        return AdapterMethod.DORA if self.use_dora else AdapterMethod.LORA

    def __str__(self) -> str:
        name = "DoRA" if self.use_dora else "LoRA"
        rslora = " (rsLoRA)" if self.use_rslora else ""
        return f"{name} r={self.rank}, alpha={self.alpha}{rslora} on {_code(self.target_modules)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLoraSettings:
    """AdaLoRA: each linear begins with the initial rank; in all, the target rank is left on average."""

    initial_rank: int
    target_rank: int
    alpha: int
    target_modules: tuple[str, ...]
    method = AdapterMethod.ADALORA

    def __str__(self) -> str:
        ranks = f"init_r={self.initial_rank}, target_r={self.target_rank}"
        return f"AdaLoRA {ranks}, alpha={self.alpha} on {_code(self.target_modules)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VeraSettings:
    """VeRA: rank R of the shared random projections, which are saved along."""

    rank: int
    target_modules: tuple[str, ...]
    method = AdapterMethod.VERA

    def __str__(self) -> str:
        return f"VeRA r={self.rank} on {_code(self.target_modules)}, projections saved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ia3Settings:
    """IA3: the linears whose outputs it rescales, and those whose inputs."""

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    method = AdapterMethod.IA3

    def __str__(self) -> str:
        return f"IA3 on the outputs of {_code(self.outputs)} and the inputs of {_code(self.inputs)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckSettings:
    """AdapterHub's SeqBnConfig: a bottleneck of D // ``reduction_factor`` after the feed-forward of each layer."""

    reduction_factor: int
    non_linearity: str = "relu"
    method = AdapterMethod.BOTTLENECK

    def __str__(self) -> str:
        return f"sequential bottleneck, reduction factor {self.reduction_factor}, {self.non_linearity}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSettings:
    """Prefix tuning: P virtual tokens, through a projection of a hidden size while it trains."""

    num_virtual_tokens: int
    projection_size: int
    method = AdapterMethod.PREFIX_TUNING

    def __str__(self) -> str:
        return f"prefix tuning, P={self.num_virtual_tokens}, through a projection of {self.projection_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """Prompt tuning: P virtual tokens, begun as a text's embeddings; ``over`` is the task it is trained on top of."""

    num_virtual_tokens: int
    text: str
    over: str | None = None
    method = AdapterMethod.PROMPT_TUNING

    def __str__(self) -> str:
        over = "" if self.over is None else f", trained over `{self.over}`"
        return f"prompt tuning, P={self.num_virtual_tokens}, begun as “{self.text}”{over}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PTuningSettings:
    """P-tuning: P virtual tokens, made by an encoder of a hidden size while it trains."""

    num_virtual_tokens: int
    encoder_size: int
    method = AdapterMethod.P_TUNING

    def __str__(self) -> str:
        return f"P-tuning, P={self.num_virtual_tokens}, by an MLP of {self.encoder_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MultitaskSettings:
    """Multitask prompt tuning of one task: P virtual tokens, begun as a text's embeddings, and a factor of rank R."""

    num_virtual_tokens: int
    text: str
    rank: int
    method = AdapterMethod.MULTITASK_PROMPT_TUNING

    def __str__(self) -> str:
        size = f"P={self.num_virtual_tokens}, rank {self.rank}"
        return f"multitask prompt tuning of one task, {size}, begun as “{self.text}”"


AdapterSettings = (
    LoraSettings
    | AdaLoraSettings
    | VeraSettings
    | Ia3Settings
    | BottleneckSettings
    | PrefixSettings
    | PromptSettings
    | PTuningSettings
    | MultitaskSettings
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Passes of AdamW with a linear schedule; the loss is the mean over the answers' tokens."""

    batch_size: int = 8
    num_epochs: int = 1
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    max_gradient_norm: float = 1.0
    seed: int = 0


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
