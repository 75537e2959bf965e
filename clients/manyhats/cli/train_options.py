"""The flags of ``manyhats train``, each with its help; the defaults shown are those of the trainer's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer


def _panel(title: str) -> Any:
    def option(*names: str, **settings: Any) -> Any:
        return typer.Option(*names, rich_help_panel=title, **settings)

    return option


_run = _panel("What is trained, and where it goes")
_data = _panel("Data")
_lora = _panel("lora, qlora, dora")
_ia3 = _panel("ia3")
_bottleneck = _panel("bottleneck")
_virtual = _panel("prefix, prompt, ptuning")
_model = _panel("Base model")
_steps = _panel("Optimization")
_watch = _panel("Evaluation and checkpoints")
_register = _panel("Registration")

Method: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="METHOD",
        help="lora, qlora, dora, ia3, bottleneck, prefix, prompt or ptuning. qlora is LoRA on the base in NF4,"
        " lora on the dense base unless --quantization nf4 is given; the others take NF4 unless told otherwise.",
        show_default=False,
    ),
]
Task: TypeAlias = Annotated[
    str | None,
    _run("--task", metavar="T", help="The task's name: a-z, 0-9, dots, dashes, underscores."),
]
Out: TypeAlias = Annotated[
    str | None,
    _run("--out", metavar="DIR", help="The artifact, its model card and report.", show_default="tasks/T"),
]
SaveDtype: TypeAlias = Annotated[
    str | None,
    _run(
        "--save-dtype",
        metavar="float32|bfloat16",
        help="Of the artifact's matrices.",
        show_default="float32",
    ),
]
InitFrom: TypeAlias = Annotated[
    str | None,
    _run(
        "--init-from",
        metavar="DIR",
        help="An artifact of the same method to go on from.",
        show_default="begin anew",
    ),
]
Config: TypeAlias = Annotated[
    Path | None,
    _run("--config", metavar="FILE", help="YAML with settings of these flags' names; flags win."),
]
Tasks: TypeAlias = Annotated[
    Path | None,
    _run(
        "--tasks",
        metavar="FILE",
        help="YAML: shared settings, and a list `tasks` of several to train at once on one base.",
    ),
]
Resume: TypeAlias = Annotated[
    bool, _run("--resume", help="Go on from the newest checkpoint in the output's directory.")
]
DryRun: TypeAlias = Annotated[
    bool, _run("--dry-run", help="Train nothing: print how much memory it would take, part by part.")
]
Data: TypeAlias = Annotated[
    str | None,
    _data(
        "--data",
        metavar="FILE|NAME",
        help="JSONL, CSV or Parquet with prompt and completion, text, or chat messages; or a `datasets` name.",
    ),
]
Eval: TypeAlias = Annotated[
    str | None, _data("--eval", metavar="FILE|NAME", help="Likewise, to evaluate on; never trained on.")
]
Chat: TypeAlias = Annotated[
    bool | None,
    _data(
        "--chat/--no-chat",
        help="A prompt is a user's message by the model's chat template.",
        show_default="no-chat",
    ),
]
System: TypeAlias = Annotated[
    str | None, _data("--system", metavar="TEXT", help="A system message ahead of each chat without one.")
]
Labels: TypeAlias = Annotated[
    list[str] | None,
    _data(
        "--label",
        metavar="TEXT",
        help="A possible completion, for accuracy in evaluations; auto takes those of the data. Repeatable.",
    ),
]
MaxLength: TypeAlias = Annotated[
    int | None,
    _data("--max-length", metavar="N", help="Of a row, in tokens.", show_default="the base's own"),
]
Overlong: TypeAlias = Annotated[
    str | None,
    _data("--overlong", metavar="error|skip|truncate", help="What of longer rows.", show_default="error"),
]
Shuffle: TypeAlias = Annotated[
    bool | None,
    _data("--shuffle/--no-shuffle", help="The rows, anew in each epoch.", show_default="shuffle"),
]
MaxTrainRows: TypeAlias = Annotated[
    int | None, _data("--max-train-rows", metavar="N", help="The first so many.", show_default="all")
]
MaxEvalRows: TypeAlias = Annotated[
    int | None, _data("--max-eval-rows", metavar="N", help="The first so many.", show_default="all")
]
IgnoreFields: TypeAlias = Annotated[
    bool | None,
    _data(
        "--ignore-fields/--no-ignore-fields",
        help="Go on without fields that nothing reads, and count them; else they are errors.",
        show_default="no-ignore-fields",
    ),
]

Rank: TypeAlias = Annotated[
    int | None, _lora("--rank", metavar="R", help="Of the deltas.", show_default="16")
]
Alpha: TypeAlias = Annotated[
    float | None, _lora("--alpha", metavar="A", help="Deltas are scaled by A / R.", show_default="32.0")
]
TargetModules: TypeAlias = Annotated[
    list[str] | None,
    _lora(
        "--target-module",
        metavar="NAME",
        help="A linear with a delta, such as q_proj or lm_head. Repeatable.",
        show_default="all linears of the layers",
    ),
]
Dropout: TypeAlias = Annotated[
    float | None, _lora("--dropout", metavar="P", help="Of the deltas' input.", show_default="0.0")
]
UseRslora: TypeAlias = Annotated[
    bool | None,
    _lora("--use-rslora/--no-use-rslora", help="Scale by A / √R instead.", show_default="no-use-rslora"),
]
RankPattern: TypeAlias = Annotated[
    list[str] | None,
    _lora("--rank-pattern", metavar="NAME=R", help="A module's own rank. Repeatable."),
]
AlphaPattern: TypeAlias = Annotated[
    list[str] | None,
    _lora("--alpha-pattern", metavar="NAME=A", help="A module's own alpha. Repeatable."),
]
LoraPlusRatio: TypeAlias = Annotated[
    float | None,
    _lora(
        "--lora-plus-ratio", metavar="X", help="LoRA+: B learns this many times faster.", show_default="1.0"
    ),
]

OutputModules: TypeAlias = Annotated[
    list[str] | None,
    _ia3(
        "--output-module",
        metavar="NAME",
        help="A linear whose output is rescaled. Repeatable.",
        show_default="k_proj, v_proj",
    ),
]
InputModules: TypeAlias = Annotated[
    list[str] | None,
    _ia3(
        "--input-module",
        metavar="NAME",
        help="A linear whose input is rescaled. Repeatable.",
        show_default="down_proj",
    ),
]

Variant: TypeAlias = Annotated[
    str | None,
    _bottleneck(
        "--variant",
        metavar="seq|double_seq|parallel",
        help="Where they act: Pfeiffer's, Houlsby's, or beside the feed-forward.",
        show_default="seq",
    ),
]
ReductionFactor: TypeAlias = Annotated[
    int | None,
    _bottleneck(
        "--reduction-factor", metavar="N", help="Of the hidden size, to the bottleneck's.", show_default="16"
    ),
]
NonLinearity: TypeAlias = Annotated[
    str | None,
    _bottleneck("--non-linearity", metavar="NAME", help="Between down and up.", show_default="relu"),
]
Scaling: TypeAlias = Annotated[
    float | None,
    _bottleneck("--scaling", metavar="X", help="Of the output.", show_default="1, and 4 for parallel"),
]

NumVirtualTokens: TypeAlias = Annotated[
    int | None,
    _virtual(
        "--num-virtual-tokens",
        metavar="P",
        help="Trained ahead of the prompt.",
        show_default="16",
    ),
]
ProjectionSize: TypeAlias = Annotated[
    int | None,
    _virtual(
        "--projection-size",
        metavar="N",
        help="prefix: hidden size of the MLP that it is trained through; 0 is none.",
        show_default="512",
    ),
]
Init: TypeAlias = Annotated[
    str | None,
    _virtual(
        "--init",
        metavar="text|vocabulary|random",
        help="prompt: what the virtual tokens begin as.",
        show_default="vocabulary",
    ),
]
InitText: TypeAlias = Annotated[
    str | None, _virtual("--init-text", metavar="TEXT", help="prompt: the text of --init text.")
]
EncoderSize: TypeAlias = Annotated[
    int | None,
    _virtual(
        "--encoder-size",
        metavar="N",
        help="ptuning: hidden size of the MLP that makes the virtual tokens.",
        show_default="512",
    ),
]

Model: TypeAlias = Annotated[
    str | None,
    _model(
        "--model",
        metavar="DIR|ID|ALIAS",
        help="A Hugging Face directory, a hub id, or a known model's name; with --dry-run also a config.json.",
        show_default="smollm2-135m-instruct",
    ),
]
Quantization: TypeAlias = Annotated[
    str | None,
    _model(
        "--quantization",
        metavar="nf4|none",
        help="Of the base's linears.",
        show_default="nf4; none for lora",
    ),
]
Dtype: TypeAlias = Annotated[
    str | None,
    _model("--dtype", metavar="auto|bfloat16|float32", help="To compute in.", show_default="auto"),
]
Device: TypeAlias = Annotated[
    str | None, _model("--device", metavar="auto|cpu|cuda", help="To train on.", show_default="auto")
]
GradientCheckpointing: TypeAlias = Annotated[
    bool | None,
    _model(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Compute activations again in the backward pass: less memory, more time.",
        show_default="gradient-checkpointing",
    ),
]
NumThreads: TypeAlias = Annotated[
    int | None, _model("--num-threads", metavar="N", help="0 is one per core.", show_default="0")
]

BatchSize: TypeAlias = Annotated[
    int | None, _steps("--batch-size", metavar="N", help="Rows of a step.", show_default="16")
]
BatchTokens: TypeAlias = Annotated[
    int | None,
    _steps("--batch-tokens", metavar="N", help="Packing: rows up to this many tokens a step instead."),
]
GradientAccumulation: TypeAlias = Annotated[
    int | None,
    _steps("--gradient-accumulation", metavar="N", help="Batches of one step.", show_default="1"),
]
Epochs: TypeAlias = Annotated[
    float | None, _steps("--epochs", metavar="X", help="Passes over the data.", show_default="1.0")
]
MaxSteps: TypeAlias = Annotated[
    int | None, _steps("--max-steps", metavar="N", help="End after so many.", show_default="no bound")
]
LearningRate: TypeAlias = Annotated[
    float | None,
    _steps("--learning-rate", metavar="X", help="At its peak.", show_default="by the method"),
]
Schedule: TypeAlias = Annotated[
    str | None,
    _steps("--schedule", metavar="linear|cosine|constant", help="Behind the warm-up.", show_default="linear"),
]
WarmupSteps: TypeAlias = Annotated[
    float | None,
    _steps(
        "--warmup-steps",
        metavar="X",
        help="Of a linear rise; below 1, a share of all.",
        show_default="0.03",
    ),
]
Optimizer: TypeAlias = Annotated[
    str | None,
    _steps(
        "--optimizer",
        metavar="adamw|adamw_8bit|paged_adamw_8bit",
        help="The 8-bit ones need CUDA.",
        show_default="adamw",
    ),
]
WeightDecay: TypeAlias = Annotated[
    float | None, _steps("--weight-decay", metavar="X", help="Of AdamW.", show_default="0.0")
]
Beta1: TypeAlias = Annotated[
    float | None, _steps("--beta1", metavar="X", help="Of AdamW.", show_default="0.9")
]
Beta2: TypeAlias = Annotated[
    float | None, _steps("--beta2", metavar="X", help="Of AdamW.", show_default="0.999")
]
MaxGradNorm: TypeAlias = Annotated[
    float | None,
    _steps(
        "--max-grad-norm", metavar="X", help="Scale gradients down to it; 0 is no bound.", show_default="1.0"
    ),
]
Seed: TypeAlias = Annotated[
    int | None,
    _steps("--seed", metavar="N", help="Of first values, order and dropout.", show_default="0"),
]

EvalSteps: TypeAlias = Annotated[
    int | None,
    _watch("--eval-steps", metavar="N", help="Evaluate so often; 0 at each epoch's end.", show_default="0"),
]
Patience: TypeAlias = Annotated[
    int | None,
    _watch(
        "--patience",
        metavar="N",
        help="Stop after this many evaluations without a better loss; 0 never.",
        show_default="0",
    ),
]
CheckpointSteps: TypeAlias = Annotated[
    int | None,
    _watch(
        "--checkpoint-steps",
        metavar="N",
        help="Write one so often; 0 only at an interrupt and at the end.",
        show_default="0",
    ),
]
KeepCheckpoints: TypeAlias = Annotated[
    int | None,
    _watch("--keep-checkpoints", metavar="N", help="The newest so many, and the best.", show_default="2"),
]

Register: TypeAlias = Annotated[
    str | None,
    _register(
        "--register",
        metavar="HOST:PORT",
        help="Send the artifact to this server at the end, and make it the task's active version.",
    ),
]
NoActivate: TypeAlias = Annotated[
    bool, _register("--no-activate", help="Leave the task on the version that is active now.")
]
ActivateIf: TypeAlias = Annotated[
    str | None,
    _register(
        "--activate-if",
        metavar="CONDITION",
        help="Make it the active version only if this holds of its held-out results: loss, perplexity or accuracy,"
        " as in 'accuracy >= 0.9 and loss < 1.5'. It is registered in any case.",
    ),
]
RegisterTimeout: TypeAlias = Annotated[
    float | None,
    _register("--timeout", metavar="SECONDS", min=0, help="Give the server so long to take it."),
]
