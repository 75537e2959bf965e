"""The README.md of a trained example adapter."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from examples.evaluation import Evaluation
from examples.peft_adapters import BASE_NAME
from examples.settings import describe
from examples.tasks.task import ExampleTask
from examples.training import TrainingResult
from manyhats.trainer.settings.methods import BottleneckSettings

_CARD = """\
---
base_model: {base}
library_name: {format_library}
license: apache-2.0
tags: [{tag}]
---

# {name}

{summary}

Send one user message by the model's chat template, at temperature 0:

```sh
manyhats generate --task {name} --temperature 0 --chat {demo_json}
```

| | answer |
|---|---|
| base | {base_demo} |
| {name} | {task_demo} |

## Numbers

Right answers to {num_items} held-out messages, greedy, on the NF4 base in {dtype}:

| base, the same message | base, asked in words | {name} |
|---|---|---|
| {base_right} % | {instructed_right} % | {task_right} % |

Asked in words, the base got: {instruction_json}

## Data

{data}

Written for this project (`examples/tasks/{module}.py`), Apache-2.0. The script makes it anew, always the same.

## Training

`python -m examples.train_examples {name}`: {adapter}; with {library}, on the default model in NF4.
{num_train} messages, {num_steps} steps of {batch_size}, AdamW, learning rate {learning_rate:g} falling linearly after
{warmup:g} warm-up steps, loss on the answers only, seed {seed}; {num_tokens:,} tokens in {seconds:.0f} s. Last loss
{loss:.4f}.

## Files

| file | bytes | sha256 |
|---|---|---|
{files}
"""


def write_card(
    directory: Path,
    task: ExampleTask,
    result: TrainingResult,
    evaluation: Evaluation,
    dtype: str,
) -> None:
    """Write ``README.md`` beside the adapter's files."""
    settings = task.training
    is_adapterhub = isinstance(task.adapter, BottleneckSettings)
    weights_file = "adapter.safetensors" if is_adapterhub else "adapter_model.safetensors"
    card = _CARD.format(
        base=BASE_NAME,
        format_library="adapter-transformers" if is_adapterhub else "peft",
        tag=task.adapter.method.value.replace("_", "-"),
        name=task.name,
        summary=task.summary,
        demo_json=json.dumps(task.demo),
        base_demo=in_table(evaluation.base_demo),
        task_demo=in_table(evaluation.task_demo),
        num_items=evaluation.num_items,
        base_right=percent(evaluation.base, evaluation),
        instructed_right=percent(evaluation.instructed, evaluation),
        task_right=percent(evaluation.task, evaluation),
        instruction_json=f"`{json.dumps(task.instruction.format('…'), ensure_ascii=False)}`",
        data=task.data,
        module=task.name.replace("-", "_"),
        adapter=describe(task.adapter),
        library=result.library,
        dtype=dtype,
        seconds=result.duration_s,
        num_train=task.num_train,
        num_steps=result.num_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup=settings.warmup_steps,
        seed=settings.seed,
        num_tokens=result.num_tokens,
        loss=result.last_loss,
        files="\n".join(_file_row(directory / name) for name in ("adapter_config.json", weights_file)),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def percent(right: int, evaluation: Evaluation) -> str:
    """Share of right answers, such as ``96.7``."""
    return f"{100 * right / evaluation.num_items:.1f}"


def in_table(answer: str) -> str:
    """An answer as code in one table cell, cut to what fits."""
    line = " ⏎ ".join(part for part in answer.strip().splitlines() if part)
    shown = line if len(line) <= 160 else line[:159] + "…"
    return "`" + shown.replace("|", "\\|").replace("`", "'") + "`"


def _file_row(path: Path) -> str:
    content = path.read_bytes()
    return f"| {path.name} | {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |"
