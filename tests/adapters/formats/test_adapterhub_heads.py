"""Heads that AdapterHub saves beside an adapter: what they become, what is refused, and where their files go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterUnsupportedError,
    ArgumentInvalidError,
    BaseMismatchError,
)
from manyhats.adapters.formats.adapterhub.task_head import find_head
from manyhats.adapters.heads import Pooling, ScoreActivation, TaskKind
from manyhats.adapters.lowering.convert import convert
from manyhats.adapters.lowering.inspect import inspect
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.client.upload import read_files
from support.factories.adapterhub import NAME, make_adapterhub
from support.factories.adapters import make_base
from support.factories.tiny_encoders import HIDDEN, make_encoder_base
from support.factories.uploads import content_of, send

LABELS = {"no": 1, "yes": 0, "perhaps": 2}


BASE = make_encoder_base()


def flexible(**fields: Any) -> dict[str, Any]:
    inner = {
        "head_type": "classification",
        "num_labels": 3,
        "layers": 2,
        "activation_function": "tanh",
        "bias": True,
        "dropout_prob": None,
        "label2id": LABELS,
        "use_pooler": False,
    }
    return {"config": {**inner, **fields}, "hidden_size": HIDDEN, "model_type": "bert", "name": NAME}


def static(model_class: str, model_type: str, num_labels: int = 3) -> dict[str, Any]:
    return {
        "config": None,
        "hidden_size": HIDDEN,
        "label2id": {f"l{index}": index for index in range(num_labels)},
        "model_class": model_class,
        "model_type": model_type,
        "name": None,
        "num_labels": num_labels,
    }


def shapes_of(**layers: int) -> dict[str, tuple[int, ...]]:
    """Of linears by index, ``i4=3``: their outputs."""
    named = {f"heads.{NAME}.{index[1:]}": size for index, size in layers.items()}
    weights = {f"{path}.weight": (size, HIDDEN) for path, size in named.items()}
    return weights | {f"{path}.bias": (size,) for path, size in named.items()}


def static_shapes(**modules: int) -> dict[str, tuple[int, ...]]:
    named = {path.replace("__", "."): size for path, size in modules.items()}
    weights = {f"{path}.weight": (size, HIDDEN) for path, size in named.items()}
    return weights | {f"{path}.bias": (size,) for path, size in named.items()}


def tensors_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


TWO = shapes_of(i1=HIDDEN, i4=3)


@pytest.mark.parametrize("shapes", [TWO, shapes_of(i0=HIDDEN, i2=3)], ids=["dropout", "none"])
def test_layers_follow_each_other_by_their_indices_with_or_without_dropout(
    shapes: dict[str, tuple[int, ...]],
) -> None:
    tensors = tensors_of(shapes)
    head = find_head(flexible(), shapes, BASE).lower(tensors, BASE)
    assert (head.kind, head.pooling) == (TaskKind.CLASSIFY, Pooling.FIRST)
    assert [layer.activation for layer in head.layers] == ["tanh", None]
    assert [tuple(layer.weight.shape) for layer in head.layers] == [(HIDDEN, HIDDEN), (3, HIDDEN)]
    assert head.labels == ("yes", "no", "perhaps")
    assert head.activation is ScoreActivation.SOFTMAX


@pytest.mark.parametrize(
    ("head_type", "num_labels", "kind", "pooling", "activation"),
    [
        ("multilabel_classification", 3, TaskKind.CLASSIFY, Pooling.FIRST, ScoreActivation.SIGMOID),
        ("tagging", 3, TaskKind.CLASSIFY_TOKENS, Pooling.ALL, ScoreActivation.SOFTMAX),
        ("question_answering", 2, TaskKind.SPAN, Pooling.ALL, ScoreActivation.SOFTMAX),
        ("classification", 1, TaskKind.CLASSIFY, Pooling.FIRST, ScoreActivation.NONE),
    ],
)
def test_the_type_says_what_a_head_reads_and_how_its_outputs_become_scores(
    head_type: str, num_labels: int, kind: TaskKind, pooling: Pooling, activation: ScoreActivation
) -> None:
    shapes = shapes_of(i1=num_labels)
    config = flexible(head_type=head_type, num_labels=num_labels, layers=1, label2id=None)
    head = find_head(config, shapes, BASE).lower(tensors_of(shapes), BASE)
    assert (head.kind, head.pooling, head.activation) == (kind, pooling, activation)
    assert head.labels == ()


def test_a_head_on_the_pooler_begins_with_the_bases_own() -> None:
    base = make_encoder_base(has_pooler=True)
    head = find_head(flexible(use_pooler=True), TWO, base)
    assert [layer.weight for layer in head.layers] == [
        None,
        f"heads.{NAME}.1.weight",
        f"heads.{NAME}.4.weight",
    ]
    with pytest.raises(AdapterInvalidError, match="use_pooler"):
        find_head(flexible(use_pooler=True), TWO, BASE)


@pytest.mark.parametrize(
    ("model_class", "model_type", "shapes", "activations"),
    [
        (
            "RobertaForSequenceClassification",
            "roberta",
            static_shapes(classifier__dense=HIDDEN, classifier__out_proj=3),
            ["tanh", None],
        ),
        (
            "ElectraForSequenceClassification",
            "electra",
            static_shapes(classifier__dense=HIDDEN, classifier__out_proj=3),
            ["gelu", None],
        ),
        (
            "DistilBertForSequenceClassification",
            "distilbert",
            static_shapes(pre_classifier=HIDDEN, classifier=3),
            ["relu", None],
        ),
        ("BertForSequenceClassification", "bert", static_shapes(classifier=3), ["tanh", None]),
        ("AlbertForSequenceClassification", "albert", static_shapes(classifier=3), ["tanh", None]),
        ("BertForTokenClassification", "bert", static_shapes(classifier=3), [None]),
        ("BertForQuestionAnswering", "bert", static_shapes(qa_outputs=2), [None]),
    ],
)
def test_static_heads_are_those_of_transformers_classes(
    model_class: str, model_type: str, shapes: dict[str, tuple[int, ...]], activations: list[str | None]
) -> None:
    num_labels = 2 if "Question" in model_class else 3
    narrow = {"embedding_size": 8} if model_type == "albert" else {}
    base = make_encoder_base(model_type, has_pooler=model_type in ("albert", "bert"), **narrow)
    head = find_head(static(model_class, model_type, num_labels), shapes, base)
    assert [layer.activation for layer in head.layers] == activations
    assert head.labels == tuple(f"l{index}" for index in range(num_labels))
    assert head.names == frozenset(shapes)


@pytest.mark.parametrize(
    ("config", "shapes", "base", "error", "match"),
    [
        (flexible(head_type="multiple_choice"), TWO, BASE, AdapterUnsupportedError, "head_type"),
        (flexible(head_type="causal_lm"), TWO, BASE, AdapterUnsupportedError, "head_type"),
        (flexible(new_field=3), TWO, BASE, AdapterUnsupportedError, "new_field"),
        (flexible(activation_function="prelu"), TWO, BASE, AdapterUnsupportedError, "activation_function"),
        (flexible(layers=1), TWO, BASE, AdapterInvalidError, "layers"),
        (flexible(num_labels=4), TWO, BASE, AdapterInvalidError, "num_labels"),
        (flexible(label2id={"a": 0, "b": 1}), TWO, BASE, AdapterInvalidError, "label2id"),
        (flexible(label2id={"a": 0, "b": 0, "c": 1}), TWO, BASE, AdapterInvalidError, "label2id"),
        (flexible(label2id=[0]), TWO, BASE, AdapterInvalidError, "label2id"),
        (flexible(bias=False), TWO, BASE, AdapterInvalidError, "bias"),
        (flexible(head_type="question_answering"), TWO, BASE, AdapterInvalidError, "num_labels"),
        (flexible(), shapes_of(i1=8, i4=3), BASE, AdapterInvalidError, "shape"),
        (flexible(), TWO | {"heads.other.1.weight": (3, 16)}, BASE, AdapterInvalidError, "heads.other"),
        (flexible() | {"hidden_size": 8}, TWO, BASE, BaseMismatchError, "hidden_size"),
        (flexible() | {"config": 3}, TWO, BASE, AdapterInvalidError, "head_config"),
        (static("BertForMaskedLM", "bert"), {}, BASE, AdapterUnsupportedError, "model_class"),
        (
            static("BertForSequenceClassification", "bert"),
            static_shapes(classifier=3),
            BASE,
            AdapterInvalidError,
            "pooler",
        ),
        (
            flexible() | {"model_type": "llama"},
            TWO,
            make_base(hidden_size=HIDDEN),
            AdapterUnsupportedError,
            "head_config",
        ),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_by_name(
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    base: BaseDescription,
    error: type[AdapterError],
    match: str,
) -> None:
    with pytest.raises(error, match=match):
        find_head(config, shapes, base)


def test_a_config_that_does_not_say_whether_it_reads_the_pooler_is_refused() -> None:
    config = flexible()
    del config["config"]["use_pooler"]
    with pytest.raises(AdapterUnsupportedError, match="use_pooler"):
        find_head(config, TWO, BASE)


# Files


def make_headed(directory: Path, **fields: Any) -> Path:
    make_adapterhub(directory, BASE)
    return add_head(directory, **fields)


def add_head(directory: Path, **fields: Any) -> Path:
    (directory / "head_config.json").write_text(json.dumps(flexible(**fields)))
    save_file(tensors_of(TWO), directory / "model_head.safetensors")
    return directory


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return open_store(tmp_path / "store", BASE, [tmp_path])


def test_the_heads_files_are_part_of_the_version_and_of_its_digest(
    store: AdapterStore, tmp_path: Path
) -> None:
    headed = store.register(Registration("a", Uri(str(make_headed(tmp_path / "a"))))).record
    make_adapterhub(tmp_path / "b", BASE)
    bare = store.register(Registration("b", Uri(str(tmp_path / "b")))).record
    assert (headed.kind, bare.kind) == (TaskKind.CLASSIFY, TaskKind.EMBED)
    assert headed.digest != bare.digest
    assert headed.num_parameters == bare.num_parameters + sum(t.numel() for t in tensors_of(TWO).values())
    head = store.lower(headed).head
    assert head is not None
    assert torch.equal(head.layers[1].weight, tensors_of(TWO)[f"heads.{NAME}.4.weight"])
    store.export("a", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "a").iterdir()
    )


def test_labels_in_the_files_are_the_versions_unless_the_registration_names_others(
    store: AdapterStore, tmp_path: Path
) -> None:
    uri = Uri(str(make_headed(tmp_path / "a")))
    own = store.register(Registration("a", uri, labels={"team": "x"})).record
    assert own.labels == {"team": "x", "class.0": "yes", "class.1": "no", "class.2": "perhaps"}
    others = {"class.0": "ja", "class.1": "nein", "class.2": "vielleicht"}
    assert store.register(Registration("b", uri, labels=others)).record.labels == others
    with pytest.raises(ArgumentInvalidError, match="3"):
        store.register(Registration("c", uri, labels={"class.0": "ja", "class.1": "nein"}))


def test_of_several_parts_one_may_have_a_head(store: AdapterStore, tmp_path: Path) -> None:
    make_adapterhub(tmp_path / "first", BASE, leave_out=[1])
    make_adapterhub(tmp_path / "second", BASE, leave_out=[0])

    def compose(*names: str) -> AdapterRecord:
        parts = Parts(tuple(Part(str(tmp_path / name)) for name in names))
        return store.register(Registration("-".join(names), parts)).record

    assert compose("first", "second").kind is TaskKind.EMBED
    add_head(tmp_path / "second")
    assert compose("first", "second").kind is TaskKind.CLASSIFY
    add_head(tmp_path / "first")
    with pytest.raises(AdapterUnsupportedError, match="at most one part"):
        compose("first", "second")


def test_an_upload_takes_the_head_along(store: AdapterStore, tmp_path: Path) -> None:
    source = make_headed(tmp_path / "a")
    registered = store.register(Registration("a", Uri(str(source)))).record
    assert send(store, "b", content_of(source)).record.digest == registered.digest
    assert {file.path.name for file in read_files(source)} == {path.name for path in source.iterdir()}


def test_a_pickled_head_is_converted_with_its_adapter(store: AdapterStore, tmp_path: Path) -> None:
    source = make_headed(tmp_path / "a")
    expected = store.register(Registration("a", Uri(str(source)))).record
    make_headed(tmp_path / "old")
    (tmp_path / "old" / "model_head.safetensors").unlink()
    (tmp_path / "old" / "adapter.safetensors").unlink()
    head = tensors_of(TWO)
    torch.save(head, tmp_path / "old" / "pytorch_model_head.bin")
    artifact = store.lower(expected)
    assert artifact.head is not None
    torch.save(load_file(source / "adapter.safetensors"), tmp_path / "old" / "pytorch_adapter.bin")
    convert(tmp_path / "old", tmp_path / "new")
    again = store.lower(store.register(Registration("b", Uri(str(tmp_path / "new")))).record).head
    assert again is not None
    for ours, theirs in zip(again.tensors, artifact.head.tensors, strict=True):
        assert torch.equal(ours, theirs)


def test_an_inspection_says_what_is_wrong_with_a_head(tmp_path: Path) -> None:
    assert inspect(make_headed(tmp_path / "a"), BASE).refusals == ()
    assert inspect(tmp_path / "a").refusals == ()
    found = inspect(make_headed(tmp_path / "b", head_type="causal_lm"), BASE)
    assert [refusal.subject for refusal in found.refusals] == ["head_type"]


@pytest.mark.parametrize("name", ["head_config.json", "model_head.safetensors"])
def test_half_a_head_is_refused(store: AdapterStore, tmp_path: Path, name: str) -> None:
    source = make_headed(tmp_path / "a")
    (source / name).unlink()
    with pytest.raises(AdapterUnsupportedError, match="head"):
        store.register(Registration("a", Uri(str(source))))
