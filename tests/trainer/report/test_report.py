from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from dataclasses import replace
from datetime import datetime

import pytest
import yaml

from manyhats.trainer.data.dataset import DataCounts
from manyhats.trainer.memory.peak import PeakMemory
from manyhats.trainer.report.curves import loss_curve, smoothed
from manyhats.trainer.report.events import EvaluationReport, StepReport
from manyhats.trainer.report.model_card import model_card
from manyhats.trainer.report.report import (
    ArtifactReport,
    BaseReport,
    DataReport,
    Evaluation,
    HeldOut,
    TrainingReport,
)
from manyhats.trainer.settings.methods import LoraSettings
from manyhats.trainer.settings.settings import DataSettings, ModelSettings, TrainSettings


def make_steps(count: int = 4) -> tuple[StepReport, ...]:
    return tuple(
        StepReport(
            task="t",
            step=step,
            num_steps=count,
            epoch=step / count,
            loss=2.0 / step,
            learning_rate=0.01 * step,
            grad_norm=1.5,
            num_tokens=100,
            num_targets=10,
            seconds=0.5,
        )
        for step in range(1, count + 1)
    )


def make_report() -> TrainingReport:
    evaluations = (EvaluationReport(task="t", step=4, loss=0.75, is_best=True, seconds=3.0),)
    return TrainingReport(
        settings=TrainSettings(
            task="colour",
            adapter=LoraSettings(rank=8, rank_pattern={"q_proj": 2}),
            data=DataSettings(
                train="/home/somebody/rows.jsonl",
                eval="glue/sst2:validation",
                labels=("a|b", "c"),
                system="Be brief.",
            ),
            model=ModelSettings(model="/models/llama"),
            out="/home/somebody/out",
        ),
        base=BaseReport(
            name="org/base",
            digest="sha256:1",
            digest_before="sha256:2",
            digest_after="sha256:2",
            num_parameters=200_000,
            linear_bytes=50_000,
            dtype="bfloat16",
            device="cpu",
        ),
        artifact=ArtifactReport(
            digest="sha256:3",
            method="lora",
            library="peft",
            files={"adapter_config.json": (500, "f" * 64), "adapter_model.safetensors": (1500, "e" * 64)},
            num_parameters=1000,
            num_trainable=1000,
            step=4,
            learning_rate=0.04,
        ),
        date=datetime(2026, 1, 2, 3, 4, 5),
        train=DataReport(num_rows=1234, counts=DataCounts(skipped=5, ignored={"id": 7})),
        held_out=DataReport(num_rows=40, counts=DataCounts(truncated=1)),
        steps=make_steps(),
        evaluations=evaluations,
        evaluation=Evaluation(
            num_items=40,
            labels=("a|b", "c"),
            before=HeldOut(loss=2.5, num_right=10),
            after=HeldOut(loss=0.75, num_right=38),
        ),
        stopped_early=False,
        peak_memory=PeakMemory(rss=3 * 2**20, cuda=0),
        failures=("step-000002: cannot be written",),
    )


def front_matter(card: str) -> dict[str, object]:
    _, head, _ = card.split("---\n", 2)
    fields = yaml.safe_load(head)
    assert isinstance(fields, dict)
    return fields


# JSON


def test_the_report_has_every_number() -> None:
    content = json.loads(make_report().to_json())
    assert content["task"] == "colour"
    assert content["settings"]["adapter.rank"] == 8
    assert content["settings"]["adapter.rank_pattern"] == {"q_proj": 2}
    assert content["settings"]["optimization.seed"] == 0
    assert [step["loss"] for step in content["steps"]] == [2.0, 1.0, 2 / 3, 0.5]
    assert content["steps"][1] == {
        "step": 2,
        "epoch": 0.5,
        "loss": 1.0,
        "learning_rate": 0.02,
        "grad_norm": 1.5,
        "num_tokens": 100,
        "num_targets": 10,
        "seconds": 0.5,
    }
    assert content["evaluations"] == [{"step": 4, "loss": 0.75, "is_best": True, "seconds": 3.0}]
    assert content["evaluation"] == {
        "items": 40,
        "labels": ["a|b", "c"],
        "before": {"loss": 2.5, "right": 10, "accuracy": 0.25},
        "after": {"loss": 0.75, "right": 38, "accuracy": 0.95},
    }
    assert content["artifact"]["bytes"] == 2000
    assert content["artifact"]["trainable_share"] == 0.005
    assert content["artifact"]["files"]["adapter_config.json"] == {"bytes": 500, "sha256": "f" * 64}
    assert content["base"]["digest_before"] == content["base"]["digest_after"]
    assert content["speed"] == {"tokens": 400, "tokens_per_second": 200.0, "seconds": 5.0}
    assert content["peak_memory"] == {"rss": 3 * 2**20, "cuda": 0}
    nothing = {"skipped": 0, "truncated": 0, "beginnings": 0, "ends": 0, "ignored": {}}
    assert content["data"] == {
        **nothing,
        "rows": 1234,
        "skipped": 5,
        "ignored": {"id": 7},
        "date": "2026-01-02T03:04:05",
        "eval": {**nothing, "rows": 40, "truncated": 1},
    }
    assert content["failed_checkpoints"] == ["step-000002: cannot be written"]


def test_a_report_without_evaluation_is_one_too() -> None:
    report = replace(make_report(), evaluation=None, evaluations=(), steps=())
    content = json.loads(report.to_json())
    assert content["evaluation"] is None
    assert content["speed"]["tokens_per_second"] == 0
    assert "Nothing was held out." in model_card(report)


# The model card


def test_the_card_begins_with_what_the_hub_reads() -> None:
    assert front_matter(model_card(make_report())) == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "manyhats"],
    }


@pytest.mark.parametrize(
    "name", ["", "llama", "/models/llama", "./a/b", "../b", "my models/tiny", "C:/base", "a/b/c"]
)
def test_a_base_that_is_no_hub_id_is_left_out_of_the_front_matter(name: str) -> None:
    report = make_report()
    report = replace(report, base=replace(report.base, name=name))
    assert "base_model" not in front_matter(model_card(report))


def test_the_card_says_what_a_reader_needs() -> None:
    card = model_card(make_report())
    assert "| base | 2.5000 | 25.0 % |" in card
    assert "| colour | 0.7500 | 95.0 % |" in card
    assert "manyhats adapters upload colour ." in card
    assert "manyhats generate --task colour" in card
    assert "1,234 rows of `rows.jsonl`" in card
    assert "40 rows of `glue/sst2:validation`" in card
    assert '"Be brief."' in card
    assert "5 rows left out as too long" in card
    assert "7 rows had the field id, which nothing reads: ignored" in card
    assert "Of the held-out data, 1 row truncated as too long" in card
    assert "0.500 % of the base's" in card
    assert "| adapter.rank | `8` |" in card
    assert "4 steps, 400 tokens in 5 s (200 tokens per second) in bfloat16 on cpu" in card
    assert "![The loss over the steps](training/loss.png)" in card
    assert f"| adapter_model.safetensors | 1,500 | `{'e' * 64}` |" in card


def test_the_card_says_nothing_of_the_machine_that_trained() -> None:
    card = model_card(make_report())
    assert "somebody" not in card
    assert "/models" not in card
    assert '`"llama"`' in card


def test_the_card_tells_of_an_early_stop() -> None:
    report = make_report()
    report = replace(report, stopped_early=True, artifact=replace(report.artifact, step=2))
    card = model_card(report)
    assert "It stopped early" in card
    assert "The artifact is that of step 2." in card


def test_tables_survive_what_labels_hold() -> None:
    rows = [line for line in model_card(make_report()).splitlines() if line.startswith("| data.labels")]
    assert rows == ['| data.labels | `["a\\|b", "c"]` |']


def test_a_chat_task_is_served_as_chat() -> None:
    report = make_report()
    data = replace(report.settings.data, chat=True)
    card = model_card(replace(report, settings=replace(report.settings, data=data)))
    assert "manyhats generate --task colour --temperature 0 --chat" in card


# The loss curve


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return int(width), int(height)


@pytest.mark.parametrize("num_steps", [0, 1, 300])
@pytest.mark.parametrize("before", [None, 2.0])
def test_the_loss_curve_is_a_picture(num_steps: int, before: float | None) -> None:
    evaluations = [
        EvaluationReport(task="t", step=step, loss=1.0, is_best=True, seconds=1.0) for step in (1, 2)
    ]
    data = loss_curve("task", make_steps(num_steps), evaluations if before else [], before)
    assert png_size(data) == (960, 600)
    assert len(data) > 8_000


def test_the_loss_curve_shows_its_data() -> None:
    from matplotlib.image import imread

    def picture(count: int) -> object:
        return imread(io.BytesIO(loss_curve("task", make_steps(count), [], None))).tobytes()

    assert picture(5) == picture(5)
    assert picture(5) != picture(50)


def test_drawing_leaves_pyplot_alone() -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    backend = matplotlib.get_backend()
    loss_curve("task", make_steps(), [], None)
    assert plt.get_fignums() == []
    assert matplotlib.get_backend() == backend


def test_smoothing_is_a_weighted_mean_of_all_values_so_far() -> None:
    values = [3.0, 1.0, 2.0]
    weights = [0.9**2, 0.9, 1.0]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert smoothed(values)[2] == pytest.approx(expected)
    assert smoothed([5.0] * 10) == pytest.approx([5.0] * 10)


# Peak memory


def test_the_peak_counts_what_is_gone_again() -> None:
    """In a process of its own: not every system can forget a peak, and other tests in this one had theirs."""
    code = (
        "from manyhats.trainer.memory.peak import forget_peak, peak_memory\n"
        "forget_peak()\n"
        "before = peak_memory().rss\n"
        "block = bytearray(b'x' * (64 << 20))\n"
        "del block\n"
        "assert peak_memory().rss >= before + (60 << 20), (before, peak_memory())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
