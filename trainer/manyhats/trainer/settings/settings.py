"""Settings of a training run: the method, the data, the optimization. Frozen, and checked when made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from manyhats.settings.declaration import grouped, setting
from manyhats.settings.reading import check
from manyhats.trainer.settings.declaring import (
    DATA,
    GROUPS,
    LARGEST,
    MODEL,
    RUN,
    STEPS,
    WATCH,
    WORDING,
    require,
    whole,
)
from manyhats.trainer.settings.head import HeadSettings
from manyhats.trainer.settings.methods import AdapterSettings

_MAX_EPOCHS = 10_000
_MAX_THREADS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """The data, and how a row becomes tokens.

    A source is a file (.jsonl, .json, .csv, .tsv, .parquet), or anything the ``datasets`` package loads: ``NAME:SPLIT``
    or ``NAME/CONFIG:SPLIT``, NAME being ``org/name`` on the hub or a directory; without a split, ``train``.
    """

    train: str = setting(
        name="data",
        group=DATA,
        metavar="FILE|NAME",
        help="JSONL, CSV or Parquet with prompt and completion, text, or chat messages, or what a head reads;"
        " or a `datasets` name.",
    )
    eval: str = setting(
        "", group=DATA, metavar="FILE|NAME", help="The same for evaluation; never trained on."
    )
    chat: bool = setting(False, group=DATA, help="A prompt is a user's message in the model's chat template.")
    system: str = setting("", group=DATA, help="A system message for each chat without one.")
    labels: tuple[str, ...] = setting(
        (),
        group=DATA,
        flag="label",
        help="A possible completion, for accuracy in evaluations; auto takes the data's. Of a head: a class, in order;"
        " by default the data's. Repeatable.",
    )
    max_length: int | None = whole(
        None, 2, group=DATA, shown="the base's own", help="The longest row, in tokens."
    )
    overlong: Literal["error", "skip", "truncate"] = setting(
        "error", group=DATA, help="What to do with longer rows."
    )
    shuffle: bool = setting(True, group=DATA, help="Shuffle the rows in each epoch.")
    max_train_rows: int | None = whole(None, 1, group=DATA, shown="all", help="Use only the first N.")
    max_eval_rows: int | None = whole(None, 1, group=DATA, shown="all", help="Use only the first N.")
    ignore_fields: bool = setting(
        False,
        group=DATA,
        help="Ignore and count fields that nothing reads; otherwise they are errors.",
    )

    def __post_init__(self) -> None:
        check(self, WORDING)
        require(bool(self.train), "train", "must name the training data")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationSettings:
    """How the parameters are optimized.

    The loss of a step's micro-batches is the mean over all their target tokens, as if they were one.
    """

    batch_size: int = whole(16, 1, group=STEPS, help="Rows per step.")
    batch_tokens: int | None = whole(
        None, 2, group=STEPS, help="Packing: as many rows as fit this many tokens per step instead."
    )
    gradient_accumulation: int = whole(1, 1, group=STEPS, help="Batches per step.")
    epochs: float = setting(1.0, above=0, at_most=_MAX_EPOCHS, group=STEPS, help="Passes over the data.")
    max_steps: int | None = whole(None, 1, group=STEPS, shown="no limit", help="Stop after N steps.")
    learning_rate: float | None = setting(
        None, above=0, group=STEPS, shown="by the method", help="Peak learning rate."
    )
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "linear", group=STEPS, help="Schedule after the warm-up."
    )
    warmup_steps: float = setting(
        0.03,
        at_least=0,
        at_most=LARGEST,
        group=STEPS,
        help="Warm-up steps, linear; below 1, a fraction of all steps.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = setting(
        "adamw", group=STEPS, help="Optimizer; the 8-bit ones need CUDA."
    )
    weight_decay: float = setting(0.0, at_least=0, group=STEPS, help="AdamW's.")
    beta1: float = setting(0.9, at_least=0, below=1, group=STEPS, help="AdamW's.")
    beta2: float = setting(0.999, at_least=0, below=1, group=STEPS, help="AdamW's.")
    max_grad_norm: float = setting(
        1.0, at_least=0, group=STEPS, help="Clip gradients to this norm; 0 for no limit."
    )
    eval_steps: int = whole(0, 0, group=WATCH, help="Evaluate every N steps; 0 for each epoch's end.")
    patience: int = whole(
        0, 0, group=WATCH, help="Stop after this many evaluations without improvement; 0 for never."
    )
    checkpoint_steps: int = whole(
        0, 0, group=WATCH, help="Write a checkpoint every N steps; 0 for only at interrupts and at the end."
    )
    keep_checkpoints: int = whole(2, 0, group=WATCH, help="Keep the newest N checkpoints, and the best.")
    seed: int = whole(0, 0, group=STEPS, help="Seed of initial values, order and dropout.")

    def __post_init__(self) -> None:
        check(self, WORDING)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The base, and how it is computed; ``qlora`` is LoRA with ``nf4``.

    ``quantization`` ``auto`` is that of a server that is told nothing else, so that what is trained is what is served.
    ``dtype`` is that of the linears' products; ``auto`` is bfloat16 if the processor has it, else float32.
    """

    model: str = setting(
        "smollm2-135m-instruct",
        group=MODEL,
        metavar="DIR|ID|ALIAS",
        help="A Hugging Face directory, a hub id, or a known model's name; with --dry-run also a config.json.",
    )
    quantization: Literal["auto", "nf4", "none"] = setting(
        "auto",
        group=MODEL,
        shown="auto; none for lora, nf4 for qlora",
        help="How the base's linears are stored; auto is as a server does: nf4 where they have 100 million parameters"
        " or more.",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto",
        group=MODEL,
        help="The number format to compute in; auto is bfloat16 where the processor has it, else float32.",
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", group=MODEL, help="The device to train on.")
    gradient_checkpointing: bool = setting(
        True, group=MODEL, help="Recompute activations in the backward pass: less memory, more time."
    )
    num_threads: int = setting(
        0,
        at_least=0,
        at_most=_MAX_THREADS,
        must=f"must be from 0 to {_MAX_THREADS}",
        group=MODEL,
        help="Threads; 0 for one per core.",
    )

    def __post_init__(self) -> None:
        check(self, WORDING)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Settings of one task's training run."""

    task: str = setting(group=RUN, metavar="T", help="The task's name: a-z, 0-9, dots, dashes, underscores.")
    adapter: AdapterSettings
    data: DataSettings
    optimization: OptimizationSettings = OptimizationSettings()
    head: HeadSettings = HeadSettings()
    model: ModelSettings = ModelSettings()
    out: str = setting(
        "",
        group=RUN,
        metavar="DIR",
        shown="tasks/T",
        help="Directory for the artifact, its model card and report.",
    )
    save_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", group=RUN, help="Dtype of the artifact's matrices."
    )
    init_from: str = setting(
        "",
        group=RUN,
        metavar="DIR",
        shown="fresh values",
        help="An artifact of the same method to start from.",
    )

    def __post_init__(self) -> None:
        check(self, WORDING)
        is_evaluated = bool(self.data.eval) or not self.optimization.patience
        require(is_evaluated, "patience", "early stopping needs evaluation data (eval)")
        data, kind = self.data, self.head.kind
        if self.head.reads:
            require(not data.chat, "chat", f"does not apply to head {kind}: texts are read as they are")
            require(not data.system, "system", f"does not apply to head {kind}: texts are read as they are")
            require(kind != "embedding" or not data.labels, "labels", "do not apply to head embedding")
        else:
            is_scored = bool(data.eval) or not data.labels
            require(is_scored, "labels", "need evaluation data; set `eval`")


def with_quantization(settings: TrainSettings, of_base: Literal["nf4", "none"]) -> TrainSettings:
    """The base's in place of ``auto``, so that records of a training run have it."""
    if settings.model.quantization != "auto":
        return settings
    return replace(settings, model=replace(settings.model, quantization=of_base))


SETTINGS = grouped(TrainSettings, GROUPS)
"""The settings of all methods; those shown together follow each other."""
