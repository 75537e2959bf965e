"""What a training run is told: the method, the data, the optimization. Frozen, and checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from manyhats.adapters.activations import activation_name
from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.errors import AdapterError
from manyhats.trainer.errors import SettingError

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

LARGEST = 2**31 - 1
"""Of every whole number: what can be meant is smaller, and libraries count in 32 bits."""

_MAX_EPOCHS = 10_000
_MAX_SCALING = 1e6
_MAX_THREADS = 4096


def _check(is_right: bool, setting: str, message: str) -> None:
    if not is_right:
        raise SettingError(setting, message)


def _check_whole(settings: object, smallest: int, *names: str) -> None:
    """Hold whole numbers to what can be meant; None is not given."""
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            _check(value >= smallest, name, f"must be at least {smallest}")
            _check(value <= LARGEST, name, f"must be at most {LARGEST}")


def _check_activation(name: str) -> None:
    try:
        activation_name("non_linearity", name)
    except AdapterError as error:
        raise SettingError("non_linearity", error.description) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """LoRA, or DoRA with ``use_dora``.

    Attributes:
        rank: R.
        alpha: the scale is alpha / R, or alpha / √R with ``use_rslora``.
        target_modules: linears it acts on, ``lm_head`` too.
        dropout: of the deltas' input, while training.
        rank_pattern, alpha_pattern: module name (or its end, such as ``layers.3.self_attn.q_proj``) → its own.
        lora_plus_ratio: B's learning rate is this many times A's (LoRA+).

    Source: Hu et al. 2021 (arXiv:2106.09685); Liu et al. 2024 (arXiv:2402.09353); Kalajdzievski 2023
    (arXiv:2312.03732); Hayou et al. 2024 (arXiv:2402.12354).
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ALL_LINEARS
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_plus_ratio: float = 1.0

    def __post_init__(self) -> None:
        _check_whole(self, 1, "rank")
        _check(math.isfinite(self.alpha) and self.alpha > 0, "alpha", "must be above 0")
        _check(bool(self.target_modules), "target_modules", "must name a module")
        _check(0 <= self.dropout < 1, "dropout", "must be at least 0 and below 1")
        _check(all(rank >= 1 for rank in self.rank_pattern.values()), "rank_pattern", "ranks begin at 1")
        largest = max(self.rank_pattern.values(), default=1)
        _check(largest <= LARGEST, "rank_pattern", f"ranks end at {LARGEST}")
        _check(self.lora_plus_ratio >= 1, "lora_plus_ratio", "must be at least 1")

    @property
    def method(self) -> AdapterMethod:
        """LORA or DORA."""
        return AdapterMethod.DORA if self.use_dora else AdapterMethod.LORA


@dataclass(frozen=True, slots=True, kw_only=True)
class Ia3Settings:
    """IA3: which linears' outputs are rescaled, and which linears' inputs. Source: arXiv:2205.05638."""

    output_modules: tuple[str, ...] = ("k_proj", "v_proj")
    input_modules: tuple[str, ...] = ("down_proj",)
    method = AdapterMethod.IA3

    def __post_init__(self) -> None:
        both = set(self.output_modules) & set(self.input_modules)
        _check(bool(self.output_modules or self.input_modules), "output_modules", "must name a module")
        _check(not both, "input_modules", f"{', '.join(sorted(both))} is among output_modules too")


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckSettings:
    """Bottleneck adapters of D // ``reduction_factor``, laid out as AdapterHub's.

    Attributes:
        variant: ``seq`` (Pfeiffer), ``double_seq`` (Houlsby) or ``parallel`` (He et al.).
        scaling: of the bottleneck's output; None takes the variant's own (1, and 4 for ``parallel``).
    """

    variant: Literal["seq", "double_seq", "parallel"] = "seq"
    reduction_factor: int = 16
    non_linearity: str = "relu"
    scaling: float | None = None
    method = AdapterMethod.BOTTLENECK

    def __post_init__(self) -> None:
        _check_whole(self, 1, "reduction_factor")
        _check_activation(self.non_linearity)
        _check(
            self.scaling is None or 0 < abs(self.scaling) <= _MAX_SCALING,
            "scaling",
            f"must be a number other than 0, up to {_MAX_SCALING:g} either way",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSettings:
    """Prefix tuning of P virtual tokens; while it trains, through an MLP of a hidden size (0 for none).

    Source: Li and Liang 2021 (arXiv:2101.00190).
    """

    num_virtual_tokens: int = 16
    projection_size: int = 512
    method = AdapterMethod.PREFIX_TUNING

    def __post_init__(self) -> None:
        _check_whole(self, 1, "num_virtual_tokens")
        _check_whole(self, 0, "projection_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """Prompt tuning of P virtual tokens, begun as a text's embeddings, the vocabulary's, or random ones.

    Source: Lester et al. 2021 (arXiv:2104.08691).
    """

    num_virtual_tokens: int = 16
    init: Literal["text", "vocabulary", "random"] = "vocabulary"
    init_text: str = ""
    method = AdapterMethod.PROMPT_TUNING

    def __post_init__(self) -> None:
        _check_whole(self, 1, "num_virtual_tokens")
        _check(self.init != "text" or bool(self.init_text), "init_text", "must be given for init text")
        _check(self.init == "text" or not self.init_text, "init_text", "is for init text alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class PTuningSettings:
    """P-tuning: P virtual tokens, made by an MLP of a hidden size while it trains. Source: arXiv:2103.10385."""

    num_virtual_tokens: int = 16
    encoder_size: int = 512
    method = AdapterMethod.P_TUNING

    def __post_init__(self) -> None:
        _check_whole(self, 1, "num_virtual_tokens", "encoder_size")


AdapterSettings = (
    LoraSettings | Ia3Settings | BottleneckSettings | PrefixSettings | PromptSettings | PTuningSettings
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """The data, and how a row becomes tokens.

    Attributes:
        train: a file (.jsonl, .json, .csv, .tsv, .parquet), or what the ``datasets`` package loads: ``NAME:SPLIT`` or
            ``NAME/CONFIG:SPLIT``, NAME being ``org/name`` on the hub or a directory; without a split, ``train``.
        eval: likewise; empty for none.
        chat: ``prompt`` is one user message by the model's chat template, rather than plain text.
        system: a system message ahead of each chat, if the row has none.
        labels: what evaluation scores as the possible completions; empty for none; ``("auto",)`` takes the distinct
            completions of the training data.
        max_length: of a row in tokens; None takes the base's.
        overlong: what to do with a longer row.
        shuffle: the order of the training rows, anew each epoch.
        max_train_rows, max_eval_rows: the first so many; None for all.
        ignore_fields: go on without fields that nothing reads, and count them; else they are errors.
    """

    train: str
    eval: str = ""
    chat: bool = False
    system: str = ""
    labels: tuple[str, ...] = ()
    max_length: int | None = None
    overlong: Literal["error", "skip", "truncate"] = "error"
    shuffle: bool = True
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    ignore_fields: bool = False

    def __post_init__(self) -> None:
        _check(bool(self.train), "train", "must name the training data")
        _check_whole(self, 2, "max_length")
        _check_whole(self, 1, "max_train_rows", "max_eval_rows")
        is_scored = bool(self.eval) or not self.labels
        _check(is_scored, "labels", "need evaluation data to be scored on; set `eval`")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationSettings:
    """How the parameters are moved.

    Attributes:
        batch_size: rows of one optimizer step.
        batch_tokens: packing: fill a step with rows up to this many tokens instead; None for ``batch_size`` rows.
        gradient_accumulation: micro-batches of one step, each of ``batch_size`` rows; their loss is the mean over
            all their target tokens, as if they were one.
        epochs: passes over the data; a fraction ends within one.
        max_steps: ends earlier; None for no bound.
        learning_rate: at its peak; None takes the method's default.
        schedule: after the warm-up.
        warmup_steps: of a linear rise; below 1 it is a share of all steps.
        optimizer: ``adamw``, or on CUDA ``adamw_8bit`` and ``paged_adamw_8bit`` of bitsandbytes.
        max_grad_norm: gradients are scaled down to it; 0 for no bound.
        eval_steps: evaluate the loss every N steps; 0 only at each epoch's end.
        patience: stop after this many evaluations without a better loss; 0 never stops early.
        checkpoint_steps: write one every N steps; 0 only at an interrupt and at the end.
        keep_checkpoints: the newest so many, besides the best.
    """

    batch_size: int = 16
    batch_tokens: int | None = None
    gradient_accumulation: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: float = 0.03
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    eval_steps: int = 0
    patience: int = 0
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        _check_whole(self, 1, "batch_size", "gradient_accumulation", "max_steps")
        _check_whole(self, 2, "batch_tokens")
        _check_whole(self, 0, "eval_steps", "patience", "checkpoint_steps", "keep_checkpoints", "seed")
        _check(self.epochs > 0, "epochs", "must be above 0")
        _check(self.epochs <= _MAX_EPOCHS, "epochs", f"must be at most {_MAX_EPOCHS}")
        rate = self.learning_rate
        _check(rate is None or 0 < rate < math.inf, "learning_rate", "must be above 0")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            _check(getattr(self, name) >= 0, name, "must be at least 0")
        _check(self.warmup_steps <= LARGEST, "warmup_steps", f"must be at most {LARGEST}")
        for name in ("beta1", "beta2"):
            _check(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The base, and how it is computed.

    Attributes:
        model: a directory, hub id or alias.
        quantization: of the base's linears; ``qlora`` is LoRA with ``nf4``.
        dtype: of the linears' products; ``auto`` is bfloat16 where the processor has it, else float32.
        gradient_checkpointing: keep one tensor per layer and compute the rest again in the backward pass.
        num_threads: 0 takes one per processor.
    """

    model: str = "smollm2-135m-instruct"
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_checkpointing: bool = True
    num_threads: int = 0

    def __post_init__(self) -> None:
        in_range = 0 <= self.num_threads <= _MAX_THREADS
        _check(in_range, "num_threads", f"must be from 0 to {_MAX_THREADS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """One task's training.

    Attributes:
        task: names the artifact, and is what it is registered as.
        out: the artifact's directory.
        save_dtype: of the artifact's matrices; vectors are float32.
        init_from: the directory of an artifact of the same method to go on from; empty begins anew.
    """

    task: str
    adapter: AdapterSettings
    data: DataSettings
    optimization: OptimizationSettings = OptimizationSettings()
    model: ModelSettings = ModelSettings()
    out: str = ""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    init_from: str = ""

    def __post_init__(self) -> None:
        is_evaluated = bool(self.data.eval) or not self.optimization.patience
        _check(is_evaluated, "patience", "early stopping needs evaluation data (eval)")
