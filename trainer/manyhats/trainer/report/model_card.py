"""The README.md of a trained artifact: what it is, how it was made, how good it is, how to serve it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import yaml

from manyhats.adapters.heads import TaskKind
from manyhats.trainer.data.dataset import counted, sentences
from manyhats.trainer.data.head_task import HeadTask
from manyhats.trainer.report.fingerprint import settings_by_name
from manyhats.trainer.report.report import Evaluation, HeldOut, TrainingReport
from manyhats.trainer.settings.settings import TrainSettings

# Paths on the training machine mean nothing to a reader elsewhere.
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")
_PIPELINES: Mapping[TaskKind, str] = MappingProxyType(
    {
        TaskKind.CLASSIFY: "text-classification",
        TaskKind.CLASSIFY_TOKENS: "token-classification",
        TaskKind.EMBED: "feature-extraction",
    }
)
_METRICS: Mapping[str, str] = MappingProxyType(
    {"accuracy": "accuracy", "f1": "F1", "mrr": "mean reciprocal rank", "pearson": "Pearson's correlation"}
)
_COMMANDS: Mapping[TaskKind, str] = MappingProxyType(
    {TaskKind.CLASSIFY: "classify", TaskKind.CLASSIFY_TOKENS: "tag", TaskKind.EMBED: "embed"}
)
_LEFT_OUT = frozenset({"task", "out", "data.train", "data.eval", "model.num_threads"})


def model_card(report: TrainingReport) -> str:
    """A model card with the front matter that the Hugging Face hub, PEFT and AdapterHub read."""
    settings = report.settings
    sections = [
        _front_matter(report),
        f"# {settings.task}",
        _summary(report),
        _serving(settings, report.head),
        _data(report),
        _results(report),
        _training(report),
        _settings(settings),
        _files(report),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(report: TrainingReport) -> str:
    fields = {
        **({"base_model": report.base.name} if _is_hub_id(report.base.name) else {}),
        "library_name": report.artifact.library,
        "pipeline_tag": _pipeline(report.head),
        "tags": [report.artifact.method.replace("_", "-"), "manyhats"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _pipeline(head: HeadTask | None) -> str:
    """The hub's name for what the task does."""
    return "text-generation" if head is None else _PIPELINES[head.kind]


def _is_hub_id(name: str) -> bool:
    """The hub refuses a card whose base is not one of its models."""
    return _HUB_ID.fullmatch(name) is not None


def _summary(report: TrainingReport) -> str:
    artifact = report.artifact
    method = artifact.method.replace("_", " ")
    return (
        f"An adapter of `{report.base.name or 'an unnamed base'}`, trained with manyhats: {method}, "
        f"{artifact.num_trainable:,} trained parameters ({_percent(report.trainable_share, 3)} of the base's), "
        f"{artifact.num_bytes:,} bytes."
    )


def _serving(settings: TrainSettings, head: HeadTask | None) -> str:
    labels = "" if head is None else "".join(_label_flags(head))
    return f"""\
## Serving

On a running manyhats server, from this directory:

```sh
manyhats adapters upload {settings.task} .{labels}
{_call(settings, head)}
```"""


def _label_flags(head: HeadTask) -> Iterator[str]:
    """What tells the server of the head's outputs."""
    for key, value in head.labels.items():
        yield f" \\\n  --label {shlex.quote(f'{key}={value}')}"


def _call(settings: TrainSettings, head: HeadTask | None) -> str:
    if head is None:
        chat = " --chat" if settings.data.chat else ""
        return f'manyhats generate --task {settings.task} --temperature 0{chat} "…"'
    return f'manyhats {_COMMANDS[head.kind]} --task {settings.task} "…"'


def _data(report: TrainingReport) -> str:
    data = report.settings.data
    lines = [f"{counted(report.train.num_rows, 'row')} of `{_shown_source(data.train)}`{_form(report)}."]
    if data.system:
        lines.append(f"System message: {json.dumps(data.system, ensure_ascii=False)}.")
    lines += [f"{sentence}." for sentence in sentences(report.train.counts)]
    if report.held_out is not None:
        lines.append(f"Held out: {counted(report.held_out.num_rows, 'row')} of `{_shown_source(data.eval)}`.")
        lines += [f"Of the held-out data, {sentence}." for sentence in sentences(report.held_out.counts)]
    return "## Data\n\n" + "\n".join(lines)


def _form(report: TrainingReport) -> str:
    """How a row becomes a prompt; nothing to say where it is read."""
    if report.head is not None:
        return ""
    is_chat = report.settings.data.chat
    return "; prompts as " + ("chat messages in the model's template" if is_chat else "plain text")


def _shown_source(source: str) -> str:
    """A path's last component; the name of a data set or a model as it is."""
    path = Path(source)
    is_path = path.is_absolute() or source.startswith(("./", "../", "~")) or path.suffix in _DATA_SUFFIXES
    return path.name if is_path else source


def _results(report: TrainingReport) -> str:
    evaluation = report.evaluation
    if evaluation is None:
        return "## Results\n\nNothing was held out.\n\n![The loss over the steps](training/loss.png)"
    rows = [("base", evaluation.before), (report.settings.task, evaluation.after)]
    names = list(evaluation.metrics(evaluation.after))
    unit = " (nats per token)" if report.head is None else ""
    heads = [f"loss{unit}", *(_METRICS[name] for name in names)]
    if report.head is None and names:
        heads[1:] = ["right labels"]
    table = "\n".join(
        _result_row(evaluation, name, held_out, names) for name, held_out in rows if held_out is not None
    )
    head = f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}"
    classes = evaluation.labels if report.head is None else report.head.classes
    what = "Labels" if report.head is None else "Classes"
    labels = f"\n\n{what}: {', '.join(f'`{label}`' for label in classes)}." if classes else ""
    return f"## Results\n\n{head}\n{table}{labels}\n\n![The loss over the steps](training/loss.png)"


def _result_row(evaluation: Evaluation, name: str, held_out: HeldOut, names: Sequence[str]) -> str:
    metrics = evaluation.metrics(held_out)
    cells = [f"{held_out.loss:.4f}", *(_percent(metrics[each], 1) for each in names)]
    return f"| {name} | {' | '.join(cells)} |"


def _training(report: TrainingReport) -> str:
    base, artifact = report.base, report.artifact
    early = " It stopped early: the held-out loss no longer fell." if report.stopped_early else ""
    kept = "" if artifact.step == len(report.steps) else f" The artifact is that of step {artifact.step}."
    last = f" Last loss {report.steps[-1].loss:.4f}." if report.steps else ""
    memory = report.peak_memory
    peak = f"{memory.rss / 2**20:,.0f} MiB of host memory"
    if memory.cuda:
        peak += f" and {memory.cuda / 2**20:,.0f} MiB on the GPU"
    return f"""\
## Training

{counted(len(report.steps), "step")}, {counted(report.num_tokens, "token")} in {report.duration_s:,.0f} s \
({report.tokens_per_s:,.0f} tokens per second) in {base.dtype} on {base.device}; at most {peak}.\
{last}{early}{kept}
The learning rate was {artifact.learning_rate:g} at its peak. The base was not changed: its weights had the same
digest before and after."""


def _settings(settings: TrainSettings) -> str:
    values = {**settings_by_name(settings), "model.model": _shown_source(settings.model.model)}
    rows = [f"| {name} | {_shown(value)} |" for name, value in values.items() if name not in _LEFT_OUT]
    return "## Settings\n\n| setting | value |\n|---|---|\n" + "\n".join(rows)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


def _files(report: TrainingReport) -> str:
    rows = "\n".join(_file_rows(report))
    return (
        f"## Files\n\nDigest `{report.artifact.digest}`; the whole report is `training/report.json`.\n\n"
        f"| file | bytes | sha256 |\n|---|---|---|\n{rows}"
    )


def _file_rows(report: TrainingReport) -> Iterator[str]:
    for name, (size, sha256) in sorted(report.artifact.files.items()):
        yield f"| {name} | {size:,} | `{sha256}` |"


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f} %"
