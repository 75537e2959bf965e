from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from manyhats.adapters.disk.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.trainer.errors import (
    BaseError,
    CheckpointError,
    DataError,
    DivergedError,
    OutputError,
    SettingError,
)
from manyhats.trainer.model.computation import resolve_computation
from manyhats.trainer.model.decoder import TrainingDecoder
from manyhats.trainer.report.events import Event, ScoringProgress, StepReport, TokenizingProgress
from manyhats.trainer.report.report import TrainingReport
from manyhats.trainer.run.base import TrainingBase, load_base, weights_digest
from manyhats.trainer.run.interrupt import TrainingInterrupted
from manyhats.trainer.run.task import open_task
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from manyhats.trainer.settings.settings import ModelSettings
from manyhats.trainer.train import check_before_loading, train
from support.factories.training_tasks import LABELS, TinyTask, make_tiny_task
from support.harnesses.failing_calls import FailingCalls, failing

METHODS: dict[str, AdapterSettings] = {
    "lora": LoraSettings(rank=4),
    "dora": LoraSettings(rank=4, use_dora=True),
    "ia3": Ia3Settings(),
    "bottleneck": BottleneckSettings(),
    "prefix_tuning": PrefixSettings(num_virtual_tokens=4, projection_size=8),
    "prompt_tuning": PromptSettings(num_virtual_tokens=4),
    "p_tuning": PTuningSettings(num_virtual_tokens=4, encoder_size=8),
}


@pytest.fixture
def task(tmp_path: Path) -> TinyTask:
    return make_tiny_task(tmp_path)


def losses(report: TrainingReport) -> list[float]:
    return [step.loss for step in report.steps]


def files_of(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


# The whole way


def test_a_training_leaves_an_artifact_its_card_and_its_report(task: TinyTask) -> None:
    report = train(task.settings(epochs=6), task.model)
    assert files_of(task.out) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training/checkpoints/step-000036/optimizer.safetensors",
        "training/checkpoints/step-000036/parameters.safetensors",
        "training/checkpoints/step-000036/run.json",
        "training/loss.png",
        "training/report.json",
    ]
    content = json.loads((task.out / "training/report.json").read_bytes())
    assert [step["loss"] for step in content["steps"]] == losses(report)
    assert len(content["steps"]) == 36
    assert content["method"] == "lora"
    evaluation = content["evaluation"]
    assert evaluation["items"] == 7
    assert evaluation["after"]["loss"] < 0.5 * evaluation["before"]["loss"]
    assert evaluation["after"]["loss"] == content["evaluations"][-1]["loss"]
    assert evaluation["after"]["accuracy"] == evaluation["after"]["right"] / 7
    assert (
        content["base"]["digest_before"]
        == content["base"]["digest_after"]
        == weights_digest(task.model.weights)
    )
    assert content["base"]["digest"] == task.model.description.digest
    assert content["peak_memory"]["rss"] > 2**20
    sizes = {name: (task.out / name).stat().st_size for name in content["artifact"]["files"]}
    assert {name: file["bytes"] for name, file in content["artifact"]["files"].items()} == sizes
    assert content["artifact"]["bytes"] == sum(sizes.values())
    assert content["artifact"]["num_trainable"] == content["artifact"]["num_parameters"]
    assert (task.out / "training/loss.png").read_bytes().startswith(b"\x89PNG")
    _, head, card = (task.out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "peft"
    assert "manyhats adapters upload colour ." in card


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_its_artifact_can_be_registered_as_it_is(method: str, task: TinyTask) -> None:
    report = train(task.settings(METHODS[method], epochs=4, learning_rate=2e-2), task.model)
    assert report.artifact.method == method
    assert report.artifact.library == ("adapter-transformers" if method == "bottleneck" else "peft")
    assert report.evaluation is not None
    assert report.evaluation.after.loss < report.evaluation.before.loss
    with open_source(str(task.out), [task.out]) as source:
        read = read_adapter(source, task.model.description, AdapterLimits())
    assert read.artifact.digest == report.artifact.digest
    assert set(read.files) == set(report.artifact.files)


def test_labels_may_be_those_of_the_training_data(task: TinyTask) -> None:
    report = train(task.settings(data={"labels": ("auto",)}, max_steps=1), task.model)
    assert report.evaluation is not None
    assert report.evaluation.labels == tuple(sorted(LABELS))
    assert report.evaluation.after.num_right is not None


def test_without_labels_the_loss_alone_is_reported(task: TinyTask) -> None:
    report = train(task.settings(data={"labels": ()}, max_steps=1), task.model)
    assert report.evaluation is not None
    assert report.evaluation.accuracy(report.evaluation.after) is None
    assert report.evaluation.after.loss != report.evaluation.before.loss


def test_without_evaluation_data_nothing_is_evaluated(task: TinyTask) -> None:
    report = train(task.without_evaluation(max_steps=2), task.model)
    assert (report.evaluation, report.evaluations) == (None, ())


def test_the_same_training_again_is_the_same_artifact(task: TinyTask, tmp_path: Path) -> None:
    first = train(task.without_evaluation(), task.model)
    other = replace(task.without_evaluation(), out=str(tmp_path / "other"))
    second = train(other, task.model)
    assert losses(first) == losses(second)
    assert first.artifact.digest == second.artifact.digest


def test_another_training_takes_the_place_of_a_finished_one(task: TinyTask) -> None:
    train(task.without_evaluation(max_steps=3), task.model)
    report = train(task.settings(BottleneckSettings(), max_steps=2), task.model)
    assert sorted(path.name for path in task.out.glob("*.safetensors")) == ["adapter.safetensors"]
    assert [path.name for path in (task.out / "training/checkpoints").iterdir()] == ["step-000002"]
    assert json.loads((task.out / "training/report.json").read_bytes())["method"] == "bottleneck"
    assert report.num_tokens > 0


def test_the_artifact_of_an_early_stop_is_the_best(task: TinyTask) -> None:
    # At this rate the loss soon rises.
    report = train(task.settings(eval_steps=1, patience=2, learning_rate=0.3, epochs=20), task.model)
    assert report.stopped_early
    assert report.evaluation is not None
    best = min(report.evaluations, key=lambda evaluation: evaluation.loss)
    assert report.artifact.step == best.step < len(report.steps) < 120
    assert report.evaluation.after.loss == best.loss


# Interrupts


def interrupting(at_step: int, number: signal.Signals = signal.SIGINT) -> Any:
    def listener(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == at_step:
            os.kill(os.getpid(), number)

    return listener


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_is_resumed_as_if_it_had_not_been(
    number: signal.Signals, task: TinyTask, tmp_path: Path
) -> None:
    settings = task.settings(gradient_accumulation=2, epochs=4)
    whole = train(replace(settings, out=str(tmp_path / "whole")), task.model)
    with pytest.raises(TrainingInterrupted) as raised:
        train(settings, task.model, listener=interrupting(5, number))
    assert raised.value.checkpoints == (task.out / "training/checkpoints/step-000005",)
    assert not (task.out / "adapter_config.json").exists()
    with pytest.raises(CheckpointError, match="of an unfinished training run: resume it"):
        train(settings, task.model)
    resumed = train(settings, task.model, resume=True)
    assert losses(resumed) == losses(whole)
    assert resumed.artifact.digest == whole.artifact.digest
    assert resumed.evaluation == whole.evaluation


def test_an_interrupt_while_labels_are_scored_leaves_the_artifact_and_is_resumed(task: TinyTask) -> None:
    def listener(event: Event) -> None:
        if isinstance(event, ScoringProgress) and event.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = task.settings(max_steps=3)
    with pytest.raises(TrainingInterrupted) as raised:
        train(settings, task.model, listener=listener)
    assert [path.name for path in raised.value.checkpoints] == ["step-000003"]
    assert (task.out / "adapter_config.json").exists()
    assert not (task.out / "training/report.json").exists()
    report = train(settings, task.model, resume=True)
    assert len(report.steps) == 3
    assert report.evaluation is not None


def test_a_resume_with_other_data_is_refused(task: TinyTask) -> None:
    settings = task.without_evaluation()
    with pytest.raises(TrainingInterrupted):
        train(settings, task.model, listener=interrupting(2))
    with (task.directory / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "y r:", "completion": "red"}) + "\n")
    with pytest.raises(CheckpointError, match="training rows: not the same"):
        train(settings, task.model, resume=True)


def test_a_resume_without_a_checkpoint_is_refused(task: TinyTask) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
        train(task.without_evaluation(), task.model, resume=True)


def test_what_a_killed_process_left_half_written_is_no_checkpoint(task: TinyTask) -> None:
    (task.out / "training/checkpoints/.step-000001.0123.partial").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
        check_before_loading(task.without_evaluation(), resume=True)


# What goes wrong


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    task: TinyTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    loss = TrainingDecoder.loss

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss(*args, **kwargs) * (float("nan") if calls == 6 else 1.0)

    monkeypatch.setattr(TrainingDecoder, "loss", poisoned)
    with pytest.raises(DivergedError, match="step 6") as raised:
        train(task.without_evaluation(checkpoint_steps=2), task.model)
    assert raised.value.checkpoint == task.out / "training/checkpoints/step-000004"
    assert not (task.out / "adapter_config.json").exists()


def test_a_full_disk_at_the_end_loses_nothing(task: TinyTask, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = task.without_evaluation(max_steps=3)
    base = load_base(settings.model, task.model)
    with open_task(settings, base) as opened:
        while not opened.run.is_done:
            opened.run.step()
        with (
            failing(FailingCalls(3, stays=True, code=errno.ENOSPC)),
            pytest.raises(OutputError, match="No space"),
        ):
            opened.finish()
    assert not (task.out / "adapter_config.json").exists()
    report = train(settings, task.model, resume=True)
    assert len(report.steps) == 3
    assert (task.out / "adapter_config.json").exists()


def test_a_report_that_cannot_be_written_leaves_the_artifact(
    task: TinyTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes, mode: int) -> None:
        if "report" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, mode)

    from manyhats.trainer.files import durable as durable_files

    write = durable_files.write_file
    monkeypatch.setattr(durable_files, "write_file", full)
    with pytest.raises(OutputError, match="No space left"):
        train(task.without_evaluation(max_steps=2), task.model)
    assert (task.out / "adapter_config.json").exists()
    assert not list((task.out / "training").glob("*.json"))
    assert not list((task.out / "training").glob(".*"))


def test_a_base_that_changes_is_noticed(task: TinyTask) -> None:
    settings = task.without_evaluation(max_steps=1)
    base = load_base(settings.model, task.model)
    norm = task.model.weights.final_norm.weight
    with open_task(settings, base) as opened:
        opened.run.step()
        norm[0] += 1.0
        try:
            with pytest.raises(BaseError, match="the base changed"):
                opened.finish()
        finally:
            norm[0] -= 1.0


def test_output_is_where_it_is_asked_for(task: TinyTask) -> None:
    with pytest.raises(SettingError, match="out: must name a directory"):
        train(replace(task.without_evaluation(), out=""), task.model)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"eval": ""}, SettingError, "labels: need evaluation data"),
        (
            {"labels": ("red", "green")},
            DataError,
            r"eval\.jsonl:\d+: its completion 'blue' is not one of the 2",
        ),
        ({"max_length": 513}, SettingError, "max_length: the base has room for 512 tokens"),
        ({"train": "nowhere.jsonl"}, DataError, r"nowhere\.jsonl"),
        (
            {"labels": (*LABELS, "x" * 600)},
            DataError,
            r"eval\.jsonl:1: .* no room for the longest label",
        ),
    ],
)
def test_what_is_wrong_with_the_data_is_said_before_the_first_step(
    data: dict[str, Any], error: type[Exception], message: str, task: TinyTask
) -> None:
    steps: list[Event] = []
    with pytest.raises(error, match=message):
        train(task.settings(data=data), task.model, listener=steps.append)
    assert not [event for event in steps if not isinstance(event, TokenizingProgress)]


def test_a_training_that_does_not_begin_leaves_no_directory(task: TinyTask, tmp_path: Path) -> None:
    out = tmp_path / "never" / "begun"
    settings = task.settings(data={"max_length": 513})
    with pytest.raises(SettingError, match="max_length"):
        train(replace(settings, out=str(out)), task.model)
    assert not out.exists()


def test_virtual_tokens_take_their_part_of_the_context(task: TinyTask) -> None:
    settings = task.settings(PromptSettings(num_virtual_tokens=100), data={"max_length": 413})
    with pytest.raises(SettingError, match="room for 412 tokens"):
        train(settings, task.model)
    with pytest.raises(SettingError, match="num_virtual_tokens"):
        train(task.settings(PromptSettings(num_virtual_tokens=511)), task.model)


# The base


def test_a_digest_knows_every_bit_of_the_base(task: TinyTask) -> None:
    weights = task.model.weights
    before = weights_digest(weights)
    assert before == weights_digest(weights)
    linear = weights.blocks[1].linears["down_proj"].matrix
    assert not isinstance(linear, torch.Tensor)
    norm = weights.blocks[0].norms["attention_before"].weight
    for tensor in (weights.embedding, norm, linear.packed, linear.absmax):
        flat = tensor.view(-1)
        kept = flat[0].clone()
        flat[0] = flat[0] + 1
        assert weights_digest(weights) != before
        flat[0] = kept
    assert weights_digest(weights) == before


def test_auto_is_resolved_and_a_missing_device_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    named = resolve_computation(ModelSettings(dtype="bfloat16", device="cpu"))
    assert (named.dtype, named.device.type, named.dtype_name) == (torch.bfloat16, "cpu", "bfloat16")
    from manyhats.engine.model import nf4

    for has_instructions, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(nf4, "has_bf16_product", lambda has=has_instructions: has)
        assert resolve_computation(ModelSettings(device="cpu")).dtype is expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_computation(ModelSettings(dtype="float32")).device.type == "cpu"
    with pytest.raises(SettingError, match="device: there is no CUDA device"):
        resolve_computation(ModelSettings(device="cuda"))


def test_one_base_serves_several_tasks_in_turns(task: TinyTask, tmp_path: Path) -> None:
    settings = [
        replace(
            task.without_evaluation(max_steps=4, seed=seed), task=f"t{seed}", out=str(tmp_path / f"t{seed}")
        )
        for seed in range(2)
    ]
    alone = [train(each, task.model) for each in settings]
    base: TrainingBase = load_base(settings[0].model, task.model)
    with open_task(settings[0], base) as first, open_task(settings[1], base) as second:
        for _ in range(4):
            first.run.step()
            second.run.step()
        together = [first.finish(), second.finish()]
    assert [report.artifact.digest for report in together] == [report.artifact.digest for report in alone]
