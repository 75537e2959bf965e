"""Heads in training against PEFT's models: the loss and its gradients, and what PEFT makes of the artifact."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.engine.checkpoints.loader import load_model as load_base
from manyhats.engine.request import EncodeRequest
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.methods.targets import matches
from manyhats.trainer.model.head_loss import contrastive_loss
from manyhats.trainer.report.served import SavedAdapter, read_saved
from manyhats.trainer.settings.methods import BottleneckSettings, LoraSettings
from support.factories.head_tasks import METHODS, HeadBase, head_base
from support.factories.heads_in_training import (
    TASKS,
    has,
    made,
    own_gradients,
    own_loss,
    own_outputs,
    random_rows,
    trains,
)
from support.factories.tiny_encoders import ENCODERS
from support.factories.trainables import save
from support.harnesses.engine import running_engine
from support.oracles.classifiers import load_model
from support.oracles.golden import GOLDEN, needs_golden
from support.oracles.peft_heads import KINDS, load_peft, peft_gradients, peft_loss, peft_outputs

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = (*ENCODERS, "llama")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_peft_s(family: str, task: str, tmp_path: Path) -> None:
    check_gradients(family, "lora", task, tmp_path)


@pytest.mark.parametrize("task", ["classes", "tags", "vectors"])
@pytest.mark.parametrize("method", ["dora", "ia3", "prompt"])
@pytest.mark.parametrize("family", ["bert", "albert grouped", "modernbert mean"])
def test_gradients_of_other_methods_are_peft_s_too(
    family: str, method: str, task: str, tmp_path: Path
) -> None:
    """Also where layers share their weights, and where tokens see windows."""
    check_gradients(family, method, task, tmp_path)


def check_gradients(family: str, method: str, task: str, directory: Path) -> None:
    base, adapter = made(family, method, TASKS[task])
    rows = random_rows(TASKS[task])
    model = load_peft(base.directory, adapter, TASKS[task], directory, is_trainable=True)
    loss, expected = own_loss(base, adapter, TASKS[task], rows), peft_loss(model, TASKS[task], rows)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5, abs=1e-5)
    ours, theirs = own_gradients(adapter, loss), peft_gradients(model, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        size = float(gradient.abs().max())
        assert size > 0, f"{name} has no gradient"
        assert float((ours[name] - gradient).abs().max()) <= 1e-4 * max(size, 1e-2), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_artifacts_load_in_peft_with_the_same_outputs(family: str, method: str, tmp_path: Path) -> None:
    for name, task in TASKS.items():
        if name in ("sets", "numbers") or not has(family, method, task.kind):
            continue
        base, adapter = made(family, method, task)
        model = load_peft(base.directory, adapter, task, tmp_path / name)
        rows = random_rows(task)
        ours = own_outputs(base, adapter, task, rows)
        theirs = torch.cat([peft_outputs(model, task, text) for row in rows for text in row.texts])
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=f"{family} {method} {name}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "albert grouped", "modernbert", "modernbert mean", "llama"])
def test_the_engine_computes_what_was_trained(family: str, method: str, tmp_path: Path) -> None:
    """Of any method, AdapterHub's included, on texts of which some are longer than windows."""
    for name, task in TASKS.items():
        base = head_base(family)
        if name in ("sets", "numbers") or not trains(family, method, task.kind):
            continue
        _, adapter = made(family, method, task)
        saved = read_saved("t", save(adapter, tmp_path / name), base.model.description)
        rows = random_rows(task, lengths=(9, 60, 33, 4))
        texts = [text.token_ids for row in rows for text in row.texts]
        served = asyncio.run(encoded(base, saved, texts, task.pooling))
        ours = own_outputs(base, adapter, task, rows).detach()
        torch.testing.assert_close(ours, served, atol=1e-4, rtol=1e-4, msg=f"{family} {method} {name}")


async def encoded(
    base: HeadBase, saved: SavedAdapter, texts: list[tuple[int, ...]], pooling: Pooling | None
) -> Tensor:
    """What the engine makes of texts: rows one below the other."""
    async with running_engine(base.model, lambda record: saved.lowered) as engine:
        asked = EncodeRequest(
            id="a",
            inputs=tuple(texts),
            pooling=pooling,
            applies_head=pooling is None,
            adapter=saved.record,
        )
        values = (await engine.encode(asked)).values
    return torch.cat([torch.from_numpy(value) for value in values])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "phi", "qwen2"])
def test_other_decoders_artifacts_load_in_peft_too(family: str, tmp_path: Path) -> None:
    test_artifacts_load_in_peft_with_the_same_outputs(family, "lora", tmp_path)
    for name in ("classes", "tags", "vectors"):
        if (tmp_path / name).is_dir():
            read_saved("t", tmp_path / name, head_base(family).model.description)
    assert (tmp_path / "vectors").is_dir()


# AdapterHub's heads, and what cannot be compared with a library


@needs_golden
@pytest.mark.real_model
@pytest.mark.parametrize(
    ("fixture", "settings", "kind", "classes"),
    [
        (
            "minilm_seq_bn",
            BottleneckSettings(variant="seq", reduction_factor=16),
            TaskKind.CLASSIFY,
            ("neg", "neu", "pos"),
        ),
        (
            "minilm_double_seq_bn",
            BottleneckSettings(variant="double_seq", reduction_factor=32, non_linearity="swish"),
            TaskKind.CLASSIFY_TOKENS,
            ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
        ),
    ],
)
def test_heads_beside_bottlenecks_are_laid_out_as_adapterhub_s(
    fixture: str, settings: BottleneckSettings, kind: TaskKind, classes: tuple[str, ...]
) -> None:
    model = load_base("all-minilm-l6-v2", quantization="none", dtype=torch.float32)
    golden = GOLDEN / "encoders" / fixture / "adapter"
    theirs = json.loads((golden / "head_config.json").read_text())
    task = HeadTask(kind=kind, loss=Loss.CROSS_ENTROPY, classes=classes)
    files = make_adapter(settings, theirs["name"], model, seed=0, head=task).files("float32")
    ours = json.loads(files["head_config.json"])
    assert ours == theirs
    for name in ("adapter.safetensors", "model_head.safetensors"):
        saved, made = load((golden / name).read_bytes()), load(files[name])
        assert {key: value.shape for key, value in made.items()} == {
            key: value.shape for key, value in saved.items()
        }
    config = json.loads((golden / "adapter_config.json").read_text())
    own = json.loads(files["adapter_config.json"])
    assert {**own, "config": None} == {**config, "config": None}


@pytest.mark.parametrize("family", ["bert", "modernbert mean"])
@pytest.mark.parametrize("task", TASKS)
def test_rows_alone_are_those_of_a_batch(task: str, family: str) -> None:
    """Padding, which attention adds, does not show."""
    base, adapter = made(family, "prompt", TASKS[task])
    rows = random_rows(TASKS[task])
    together = own_outputs(base, adapter, TASKS[task], rows)
    alone = torch.cat([own_outputs(base, adapter, TASKS[task], [row]) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_contrastive_loss_is_that_of_all_other_texts() -> None:
    vectors = torch.tensor([[1.0, 0], [3.0, 0], [0, 2.0], [0, 1.0], [1.0, 1.0]])
    # Queries 0 and 2; answers 1 and 3; 4 is another text of the second row.
    loss = contrastive_loss(vectors, [(0,), (1,), (2,), (3,), (4,)], (2, 3), 0.5)
    near = 2 * 0.5**0.5
    first = torch.tensor([2.0, 0.0, near])
    second = torch.tensor([0.0, 2.0, near])
    expected = -first.log_softmax(0)[0] - second.log_softmax(0)[1]
    assert float(loss) == pytest.approx(float(expected))
    # A text equal to the first answer is none of the others.
    same = contrastive_loss(vectors, [(0,), (1,), (2,), (3,), (1,)], (2, 3), 0.5)
    expected = -first[:2].log_softmax(0)[0] - second.log_softmax(0)[1]
    assert float(same) == pytest.approx(float(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_modules_hit_no_part_of_a_head(kind: TaskKind) -> None:
    """Of transformers' models, whose modules PEFT compares with them."""
    task = next(task for task in TASKS.values() if task.kind is kind)
    for family in ENCODERS:
        base = head_base(family)
        names = make_adapter(LoraSettings(), "t", base.model, seed=0, head=task).config["target_modules"]
        model = load_model(base.directory, KINDS[kind], task.num_outputs)
        hit = {path for path, _ in model.named_modules() if any(matches(path, name) for name in names)}
        found = [base.model.description.module_of(path) for path in hit]
        layers = [path for path, parts in base.model.description.modules.items() if parts[0].site.layer >= 0]
        assert sorted(map(str, found)) == sorted(layers), family
