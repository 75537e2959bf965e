"""Heads from a data file to what is served: every method and head, on an encoder and on a decoder."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.engine.request import EncodeRequest
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.errors import BaseError, CheckpointError, DataError, SettingError
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.registration import ActivationRule, head_labels, why_no_names
from manyhats.trainer.report.events import StepReport
from manyhats.trainer.report.report import TrainingReport
from manyhats.trainer.report.served import read_saved
from manyhats.trainer.run.interrupt import TrainingInterrupted
from manyhats.trainer.settings.methods import LoraSettings, PromptSettings
from manyhats.trainer.train import check_before_loading, train, train_several
from support.factories.head_tasks import HEADS, METHODS, head_base, head_rows, head_settings, write_rows
from support.factories.tiny_encoders import make_encoder
from support.harnesses.engine import load_tiny, running_engine

# Two texts, two rows of words, two queries: what any method tells apart.
TRIVIAL: dict[str, list[dict[str, Any]]] = {
    "classification": [{"text": "sun", "label": "day"}, {"text": "a dark moon", "label": "night"}],
    "tokens": [
        {"tokens": ["Max", "runs"], "tags": ["B-PER", "O"]},
        {"tokens": ["runs", "Max"], "tags": ["O", "B-PER"]},
    ],
    "embedding": [{"query": "sun", "positive": "0"}, {"query": "a dark moon", "positive": "zzzzz"}],
}
RATES = {"ia3": 5e-2, "bottleneck": 2e-2, "prompt": 5e-2, "ptuning": 2e-2, "prefix": 2e-2}


def after(report: TrainingReport) -> dict[str, float]:
    assert report.evaluation is not None
    return dict(report.evaluation.metrics(report.evaluation.after))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_method_learns_what_is_trivial(family: str, method: str, head: str, tmp_path: Path) -> None:
    rows = 8 * TRIVIAL[head]
    settings = head_settings(
        tmp_path,
        head,
        METHODS[method],
        rows=rows,
        eval_rows=TRIVIAL[head],
        epochs=30,
        batch_size=2 if head == "embedding" else 8,
        learning_rate=RATES.get(method, 1e-2),
    )
    if (family, method) == ("llama", "bottleneck") and head != "embedding":
        with pytest.raises(BaseError, match="AdapterHub's, which are served on encoders, and llama is none"):
            train(settings, head_base(family).model)
        return
    report = train(settings, head_base(family).model)
    assert after(report)["accuracy"] == 1.0
    assert report.artifact.library == ("adapter-transformers" if method == "bottleneck" else "peft")


@pytest.mark.parametrize("family", ["albert", "modernbert mean"])
@pytest.mark.parametrize("method", ["ia3", "bottleneck", "prompt"])
def test_encoders_learn_through_shared_layers_and_windows(family: str, method: str, tmp_path: Path) -> None:
    rows = TRIVIAL["classification"]
    settings = head_settings(
        tmp_path,
        "classification",
        METHODS[method],
        rows=8 * rows,
        eval_rows=rows,
        epochs=30,
        learning_rate=RATES[method],
    )
    if (family, method) == ("modernbert mean", "bottleneck"):
        with pytest.raises(
            BaseError, match="AdapterHub does not define where its bottlenecks lie on modernbert"
        ):
            train(settings, head_base(family).model)
        return
    assert after(train(settings, head_base(family).model))["accuracy"] == 1.0


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "albert", "modernbert", "llama"])
def test_what_is_reported_is_what_is_served(family: str, head: str, tmp_path: Path) -> None:
    """Too few steps to get all right, so that the counts say something."""
    base = head_base(family)
    settings = head_settings(tmp_path, head, epochs=2, learning_rate=3e-3)
    report = train(settings, base.model)
    saved = read_saved("heads", tmp_path / "out", base.model.description)

    async def served(texts: list[str]) -> list[np.ndarray]:
        tokens = [base.model.tokenizer.read(text, add_special_tokens=True).token_ids for text in texts]
        async with running_engine(base.model, lambda record: saved.lowered) as engine:
            pooling = Pooling.MEAN if head == "embedding" else None
            asked = EncodeRequest(
                id="a",
                inputs=tuple(tokens),
                pooling=pooling,
                applies_head=pooling is None,
                adapter=saved.record,
            )
            return list((await engine.encode(asked)).values)

    assert report.head is not None
    rows = head_rows(head, 16, 2)
    if head == "classification":
        values = asyncio.run(served([row["text"] for row in rows]))
        right = [
            report.head.classes[int(value.argmax())] == row["label"]
            for value, row in zip(values, rows, strict=True)
        ]
        assert after(report)["accuracy"] == sum(right) / len(rows)
    elif head == "tokens":
        values = asyncio.run(served([" ".join(row["tokens"]) for row in rows]))
        right = []
        for value, row in zip(values, rows, strict=True):
            spans = base.model.tokenizer.spans(
                " ".join(row["tokens"]), add_special_tokens=True, max_tokens=99
            )
            start = 0
            for word, tag in zip(row["tokens"], row["tags"], strict=True):
                place = next(
                    i for i, span in enumerate(spans) if span.end > start and span.start >= start - 1
                )
                while not " ".join(row["tokens"])[spans[place].start : spans[place].end].strip():
                    place += 1
                right.append(report.head.classes[int(value[place].argmax())] == tag)
                start += len(word) + 1
        assert after(report)["accuracy"] == pytest.approx(sum(right) / len(right))
    else:
        assert report.head.pooling is base.model.description.pooling
        assert after(report).keys() == {"accuracy", "mrr"}


def test_a_training_leaves_a_report_and_a_card(tmp_path: Path) -> None:
    settings = head_settings(tmp_path, "classification")
    report = train(settings, head_base("bert").model)
    content = json.loads((tmp_path / "out/training/report.json").read_bytes())
    assert content["head"] == {
        "kind": "classify",
        "loss": "cross_entropy",
        "classes": ["bright", "dark", "wet"],
        "pooling": None,
    }
    evaluation = content["evaluation"]
    assert evaluation["before"] is None
    assert evaluation["after"]["accuracy"] == after(report)["accuracy"]
    assert 0 <= evaluation["after"]["f1"] <= 1
    assert content["settings"]["head.kind"] == "classification"
    _, head, card = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["pipeline_tag"] == "text-classification"
    assert "--label class.0=bright" in card
    assert "manyhats classify --task heads" in card
    assert "| | loss | accuracy | F1 |" in card


def test_the_base_s_own_vectors_are_measured_too(tmp_path: Path) -> None:
    report = train(head_settings(tmp_path, "embedding"), head_base("bert").model)
    assert report.evaluation is not None
    assert report.evaluation.before is not None
    assert report.evaluation.metrics(report.evaluation.before).keys() == {"accuracy", "mrr"}
    assert report.evaluation.after.loss < report.evaluation.before.loss


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (lambda day: ["day", "light"] if day else [], Loss.BINARY_CROSS_ENTROPY),
        (lambda day: 0.5 if day else -1.5, Loss.SQUARED_ERROR),
    ],
)
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_sets_of_classes_and_numbers_are_learned(
    labels: Any, loss: Loss, method: str, tmp_path: Path
) -> None:
    rows = [{"text": "sun", "label": labels(True)}, {"text": "a dark moon", "label": labels(False)}]
    settings = head_settings(
        tmp_path, "classification", METHODS[method], rows=8 * rows, eval_rows=rows, epochs=30
    )
    report = train(settings, head_base("bert").model)
    assert report.head is not None
    assert report.head.loss is loss
    assert report.evaluation is not None
    assert report.evaluation.after.loss < 0.05
    metrics = after(report)
    assert metrics.get("accuracy", metrics.get("pearson")) == pytest.approx(1.0)


def test_pairs_are_read_with_the_types_of_their_tokens(tmp_path: Path) -> None:
    """Only the order of a pair tells the classes apart."""
    rows = [
        {"text": "sun", "text_pair": "moon", "label": "a"},
        {"text": "moon", "text_pair": "sun", "label": "b"},
    ]
    settings = head_settings(tmp_path, "classification", rows=8 * rows, eval_rows=rows, epochs=30)
    assert after(train(settings, head_base("bert").model))["accuracy"] == 1.0


def test_a_text_in_four_bits(tmp_path: Path) -> None:
    settings = head_settings(tmp_path, "classification", rows=8 * TRIVIAL["classification"], epochs=20)
    settings = replace(
        settings, model=replace(settings.model, quantization="nf4"), data=replace(settings.data, eval="")
    )
    report = train(settings, head_base("bert", "nf4").model)
    assert report.steps[-1].loss < 0.1
    assert report.evaluation is None


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_base_is_recorded_as_it_was(quantization: str, tmp_path: Path) -> None:
    """Settings that leave it to the base say in the report what it was."""
    settings = head_settings(tmp_path, "classification", max_steps=1)
    settings = replace(settings, model=replace(settings.model, quantization="auto"))
    report = train(settings, head_base("bert", quantization).model)
    assert report.settings.model.quantization == quantization
    content = json.loads((tmp_path / "out/training/report.json").read_bytes())
    assert content["settings"]["model.quantization"] == quantization


def test_vectors_may_be_pooled_otherwise(tmp_path: Path) -> None:
    report = train(
        head_settings(tmp_path, "embedding", of_head={"pooling": "first"}), head_base("bert").model
    )
    assert report.head is not None
    assert report.head.labels == {"embed.pooling": "first"}


# Runs


def test_an_interrupted_training_is_resumed_as_if_it_had_not_been(tmp_path: Path) -> None:
    settings = head_settings(tmp_path, "classification", LoraSettings(rank=4, dropout=0.1))
    whole = train(replace(settings, out=str(tmp_path / "whole")), head_base("bert").model)

    def interrupt(event: object) -> None:
        if isinstance(event, StepReport) and event.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted):
        train(settings, head_base("bert").model, listener=interrupt)
    resumed = train(settings, head_base("bert").model, resume=True)
    assert [step.loss for step in resumed.steps] == [step.loss for step in whole.steps]
    assert resumed.artifact.digest == whole.artifact.digest
    assert resumed.evaluation == whole.evaluation


def test_checkpoints_of_other_labels_are_refused(tmp_path: Path) -> None:
    settings = head_settings(tmp_path, "classification", max_steps=2)
    train(settings, head_base("bert").model)
    other = [{**row, "label": row["label"][::-1]} for row in head_rows("classification", 48, 1)]
    write_rows(other, tmp_path / "classification.jsonl")
    without = replace(settings, data=replace(settings.data, eval=""))
    with pytest.raises(CheckpointError, match=r"is of another training run: .*classes: "):
        train(without, head_base("bert").model, resume=True)


def test_heads_and_continued_texts_take_turns_on_one_base(tmp_path: Path) -> None:
    tasks = []
    for head in HEADS:
        directory = tmp_path / head
        directory.mkdir()
        tasks.append(replace(head_settings(directory, head, max_steps=3), task=head))
    plain = write_rows([{"prompt": "a ", "completion": "b"}] * 8, tmp_path / "plain.jsonl")
    tasks.append(
        replace(
            tasks[0],
            task="plain",
            head=type(tasks[0].head)(),
            data=replace(tasks[0].data, train=str(plain), eval=""),
            out=str(tmp_path / "plain"),
        )
    )
    outcomes = train_several(tasks, head_base("llama").model)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    alone = train(replace(tasks[0], out=str(tmp_path / "alone")), head_base("llama").model)
    assert outcomes[0].report is not None
    assert [step.loss for step in outcomes[0].report.steps] == [step.loss for step in alone.steps]


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prompt"])
def test_training_goes_on_from_an_artifact_with_its_head(method: str, tmp_path: Path) -> None:
    settings = head_settings(tmp_path, "classification", METHODS[method])
    first = train(settings, head_base("bert").model)
    again = replace(settings, init_from=settings.out, out=str(tmp_path / "again"), task="other")
    second = train(again, head_base("bert").model)
    assert first.evaluation is not None
    assert second.steps[0].loss < first.steps[0].loss
    assert second.artifact.num_parameters == first.artifact.num_parameters


def test_an_artifact_with_other_classes_is_no_beginning(tmp_path: Path) -> None:
    settings = head_settings(tmp_path, "classification", max_steps=1)
    train(settings, head_base("bert").model)
    write_rows(8 * TRIVIAL["classification"], tmp_path / "two.jsonl")
    other = replace(
        settings,
        init_from=settings.out,
        out=str(tmp_path / "again"),
        data=replace(settings.data, train=str(tmp_path / "two.jsonl"), eval=""),
    )
    with pytest.raises(
        SettingError, match=r"init_from: .*classifier\.bias has shape \[3\]; these settings make \[2\]"
    ):
        train(other, head_base("bert").model)


# Registration


def test_a_head_s_classes_are_its_version_s_labels() -> None:
    task = HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.CROSS_ENTROPY, classes=("a", "b"))
    assert head_labels(task) == {"class.0": "a", "class.1": "b"}
    sets = replace(task, loss=Loss.BINARY_CROSS_ENTROPY)
    assert head_labels(sets) == {"class.0": "a", "class.1": "b", "classify.activation": "sigmoid"}
    assert head_labels(HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.SQUARED_ERROR)) == {}
    long = replace(task, classes=("a", "b" * 300))
    assert head_labels(long) == {}
    assert "at most 256 printable characters" in why_no_names(long)


@pytest.mark.parametrize(
    ("head", "rule", "message"),
    [
        ("classification", "perplexity < 3", "perplexity is not measured with head classification"),
        ("embedding", "f1 > 0.5", "f1 is not measured with head embedding; these are: accuracy, loss, mrr"),
        ("classification", "f1 > 50", "f1 is a fraction from 0 to 1"),
    ],
)
def test_conditions_on_what_is_not_measured_are_refused(
    head: str, rule: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=message):
        ActivationRule.parse(rule).check(head_settings(tmp_path, head))


def test_conditions_on_f1_are_checked(tmp_path: Path) -> None:
    settings = head_settings(tmp_path, "classification", max_steps=1)
    rule = ActivationRule.parse("f1 >= 0.99 and loss < 9")
    rule.check(settings)
    report = train(settings, head_base("bert").model)
    assert rule.unmet(report.evaluation).startswith("f1 ")


# Refusals


@pytest.mark.parametrize(
    ("family", "head", "method", "message"),
    [
        ("bert", "none", "lora", "bert is an encoder, which continues no text: set `head`"),
        ("opt", "tokens", "lora", "no opt model with a head for classes of tokens"),
        ("distilbert", "classification", "prefix", "no prefix tuning on distilbert"),
        ("albert", "embedding", "prefix", "no prefix tuning on albert, whose models take no keys"),
        ("modernbert", "tokens", "prefix", "no prefix tuning on modernbert"),
        ("camembert", "classification", "bottleneck", "camembert"),
        ("llama", "tokens", "bottleneck", "served on encoders, and llama is none"),
    ],
)
def test_what_no_library_has_is_refused_by_name(
    family: str, head: str, method: str, message: str, tmp_path: Path
) -> None:
    if head == "none":
        rows = [{"text": "x y z"}]
        settings = head_settings(tmp_path, "classification", METHODS[method], rows=rows)
        settings = replace(settings, head=type(settings.head)())
    else:
        settings = head_settings(tmp_path, head, METHODS[method])
    with pytest.raises(BaseError, match=message):
        train(settings, head_base(family).model)
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_pooler_has_no_head_of_bert_s(tmp_path: Path) -> None:
    checkpoint = make_encoder(tmp_path / "model", auto="AutoModelForMaskedLM")
    model = load_tiny(checkpoint)
    assert not model.description.has_pooler
    with pytest.raises(
        BaseError, match=r"a head of bert reads the base's bert\.pooler\.dense, and this base has none"
    ):
        train(head_settings(tmp_path, "classification"), model)
    assert after(train(head_settings(tmp_path, "tokens"), model))["accuracy"] > 0.5


@pytest.mark.parametrize("head", ["classification", "tokens"])
def test_modernbert_s_heads_need_what_is_in_front_of_them(head: str, tmp_path: Path) -> None:
    model = load_tiny(make_encoder(tmp_path / "model", "modernbert"))
    assert not model.description.has_pooler
    with pytest.raises(
        BaseError, match=r"a head of modernbert reads the base's head\.dense, and this base has none"
    ):
        train(head_settings(tmp_path, head), model)
    assert after(train(head_settings(tmp_path, "embedding"), model)).keys() == {"accuracy", "mrr"}


def test_modules_of_heads_are_trained_as_a_whole(tmp_path: Path) -> None:
    model = head_base("bert").model
    task = HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.CROSS_ENTROPY, classes=("a", "b"))
    for name, also in (("dense", "pooler.dense"), ("pooler.dense", "pooler.dense")):
        with pytest.raises(SettingError, match="target_modules: "):
            make_adapter(LoraSettings(target_modules=(name,)), "t", model, seed=0, head=task)
        assert also
    decoder = head_base("llama").model
    with pytest.raises(SettingError, match="lm_head is not there where texts are read"):
        make_adapter(LoraSettings(target_modules=("q_proj", "lm_head")), "t", decoder, seed=0, head=task)


def test_settings_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    settings = head_settings(tmp_path, "classification")
    with pytest.raises(SettingError, match="chat: does not apply to head classification"):
        replace(settings, data=replace(settings.data, chat=True))
    with pytest.raises(SettingError, match="labels: do not apply to head embedding"):
        head_settings(tmp_path, "embedding", data={"labels": ("a", "b")})
    with pytest.raises(SettingError, match="pooling: only applies to head embedding"):
        head_settings(tmp_path, "tokens", of_head={"pooling": "mean"})


def test_first_rows_are_checked_before_the_base_is_loaded(tmp_path: Path) -> None:
    settings = head_settings(tmp_path, "classification", rows=[{"text": "x"}])
    with pytest.raises(DataError, match=r"classification\.jsonl:1: has text, but no label"):
        check_before_loading(settings)


def test_virtual_tokens_leave_less_of_the_context(tmp_path: Path) -> None:
    settings = head_settings(
        tmp_path,
        "classification",
        PromptSettings(num_virtual_tokens=250),
        rows=[{"text": "x" * 10, "label": "a"}, {"text": "y", "label": "b"}],
    )
    with pytest.raises(DataError, match=r":1: text: has 10 tokens; the limit is 6"):
        train(settings, head_base("bert").model)
