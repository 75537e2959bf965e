"""What ``manyhats train`` makes of a seed, and what it says beforehand that it would need."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from recording.exact import Recorded, exact, file_digests
from recording.workplace import Workplace

_COLOURS = ("red", "green", "blue")
_COMMON = ["--model", "models/llama", "--device", "cpu", "--num-threads", "1", "--learning-rate", "0.005"]
METHODS: Mapping[str, str] = {
    "lora": "{method: lora, rank: 4, dropout: 0.1}",
    "rslora": "{method: lora, rank: 4, use-rslora: true, target-module: [o_proj, lm_head], lora-plus-ratio: 4}",
    "dora": "{method: dora, rank: 3, save-dtype: bfloat16}",
    "ia3": "{method: ia3, batch-tokens: 120}",
    "bottleneck-seq": "{method: bottleneck, reduction-factor: 8}",
    "bottleneck-double": "{method: bottleneck, variant: double_seq, non-linearity: swish}",
    "bottleneck-parallel": "{method: bottleneck, variant: parallel, non-linearity: gelu}",
    "prefix": "{method: prefix, num-virtual-tokens: 5, projection-size: 7, schedule: cosine}",
    "flat-prefix": "{method: prefix, num-virtual-tokens: 5, projection-size: 0, weight-decay: 0.1}",
    "prompt": "{method: prompt, num-virtual-tokens: 4, init: text, init-text: Which colour, chat: true}",
    "ptuning": "{method: ptuning, num-virtual-tokens: 4, encoder-size: 6, gradient-accumulation: 2}",
}
"""Task → its settings, as a file of tasks has them."""
BASES: Mapping[str, tuple[str, str]] = {
    "float32": ("float32", "none"),
    "nf4, bfloat16": ("bfloat16", "nf4"),
}
"""Name → dtype and quantization of the base."""


def write_data(root: Path) -> None:
    """Data whose completion is the colour that the prompt names by its first letter, and files of tasks."""
    for name, count, seed in (("train", 24, 1), ("eval", 7, 2)):
        rng = random.Random(seed)
        rows = [
            {"prompt": f"{'x' * rng.randint(1, 12)} {colour[0]}: ", "completion": colour}
            for colour in rng.choices(_COLOURS, k=count)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for dtype, quantization in BASES.values():
        (root / f"{dtype}.yaml").write_text("".join(_tasks_file(dtype, quantization)))


def _tasks_file(dtype: str, quantization: str) -> Iterator[str]:
    yield f"data: train.jsonl\neval: eval.jsonl\nlabel: [{', '.join(_COLOURS)}]\nbatch-size: 4\nmax-steps: 6\n"
    yield f"eval-steps: 3\ncheckpoint-steps: 3\nseed: 11\ndtype: {dtype}\nquantization: {quantization}\ntasks:\n"
    for task, settings in METHODS.items():
        yield f"  - {{task: {task}, {settings[1:]}\n"


def record_trainings(place: Workplace, base: str) -> dict[str, Recorded]:
    """Section ``trainings``: every method on one base, in turn; task → artifact, report and checkpoints."""
    dtype, _ = BASES[base]
    out = f"trained-{dtype}"
    place.run("train", "--tasks", f"{dtype}.yaml", "--out", out, *_COMMON)
    return {
        **{task: _made(place.root / out / task) for task in METHODS},
        "memory of all": _predicted(place, "--tasks", f"{dtype}.yaml", *_COMMON),
    }


def record_memory(place: Workplace, method: str) -> Recorded:
    """The predicted memory of one method on the default model."""
    args = ("--task", "task", "--data", "train.jsonl", "--device", "cpu", "--num-threads", "1")
    return _predicted(place, method, *args)


def _predicted(place: Workplace, *args: str) -> Recorded:
    """The prediction, but what the process itself takes, which is measured."""
    prediction = json.loads(place.run("train", *args, "--dry-run", "--json"))
    del prediction["total_bytes"], prediction["parts"]["runtime"]
    return exact(prediction)


def _made(directory: Path) -> Recorded:
    artifact = {name: value for name, value in file_digests(directory).items() if "/" not in name}
    artifact.pop("README.md")  # tells times
    (report,) = directory.rglob("report.json")
    checkpoints = {}
    for path in sorted(directory.rglob("run.json")):
        state = json.loads(path.read_bytes())
        checkpoints[path.parent.name] = exact(
            {name: state[name] for name in ("fingerprint", "files", "optimizer_numbers")}
        )
    return {
        "files": exact(artifact),
        "report": exact(json.loads(report.read_bytes())),
        "checkpoints": exact(checkpoints),
    }
