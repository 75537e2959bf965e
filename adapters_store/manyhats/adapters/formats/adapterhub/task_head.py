"""Heads that AdapterHub saves beside an adapter, in files of their own: of its flexible heads, or a model's static one.

A flexible head's tensors are ``heads.{name}.{index}.*``; the index counts dropout, linear and activation of each layer.
All layers but the last are as wide as the base. A static head is that of a transformers class, under the names that it
has there, and ``config`` is null.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from manyhats.adapters.activations import activation_name
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError, shown
from manyhats.adapters.formats.adapterhub.fields import read_count, read_flag, refuse_unserved
from manyhats.adapters.formats.adapterhub.format import HEAD_CONFIG_FILE, adapter_name, check_base
from manyhats.adapters.formats.saved_head import (
    SavedHead,
    SavedLayer,
    Shape,
    alternatives,
    check_layers,
    find_layers,
    pooling_of,
)
from manyhats.adapters.heads import Pooling, ScoreActivation, TaskKind
from manyhats.adapters.sites import BaseDescription

_KINDS: Mapping[str, TaskKind] = MappingProxyType(
    {
        "classification": TaskKind.CLASSIFY,
        "multilabel_classification": TaskKind.CLASSIFY,
        "tagging": TaskKind.CLASSIFY_TOKENS,
        "question_answering": TaskKind.SPAN,
    }
)
_CLASSES: Mapping[str, TaskKind] = MappingProxyType(
    {
        "ForSequenceClassification": TaskKind.CLASSIFY,
        "ForTokenClassification": TaskKind.CLASSIFY_TOKENS,
        "ForQuestionAnswering": TaskKind.SPAN,
    }
)
_KNOWN = frozenset(
    (
        "head_type",
        "num_labels",
        "layers",
        "activation_function",
        "bias",
        "label2id",
        "use_pooler",
        "dropout_prob",  # matters only in training
    )
)
_MAX_LAYERS = 16


def find_head(config: Mapping[str, Any], shapes: Mapping[str, Shape], base: BaseDescription) -> SavedHead:
    """The head in a file.

    Args:
        config: the parsed ``head_config.json``.
        shapes: tensor name → shape, of ``model_head.safetensors``.
        base: whose rows it reads.

    Raises:
        AdapterUnsupportedError: the config asks for something that is not served; names it.
        AdapterInvalidError: a field is wrong, or contradicts the tensors.
        BaseMismatchError: it was made for another base.
    """
    check_base(config, base)
    if base.kind is not TaskKind.EMBED:
        raise AdapterUnsupportedError(
            HEAD_CONFIG_FILE,
            f"AdapterHub's heads are served on encoders, and {base.model_type} is none; save the adapter alone "
            "(save_adapter with with_head=False)",
        )
    inner = config.get("config")
    if not isinstance(inner, dict | None):
        raise AdapterInvalidError(HEAD_CONFIG_FILE, "its config must be an object, or null")
    head = _static(config, shapes, base) if inner is None else _flexible(config, inner, shapes, base)
    for name in shapes:
        if name not in head.names:
            raise AdapterInvalidError(name, "is not a tensor the head's config asks for")
    return head


def _static(config: Mapping[str, Any], shapes: Mapping[str, Shape], base: BaseDescription) -> SavedHead:
    model_class = config.get("model_class")
    found = (
        kind for end, kind in _CLASSES.items() if isinstance(model_class, str) and model_class.endswith(end)
    )
    kind = next(found, None)
    if kind is None:
        raise AdapterUnsupportedError(
            "model_class",
            f"the head of {shown(str(model_class))} is not served; these are: {', '.join(_CLASSES)}",
        )
    layers = find_layers(("model_class", str(model_class)), ("",), alternatives(kind, base), shapes, base)
    return SavedHead(
        kind, pooling_of(kind, base), layers, _labels(config, _num_outputs(config, layers, shapes, base))
    )


def _flexible(
    config: Mapping[str, Any], inner: Mapping[str, Any], shapes: Mapping[str, Shape], base: BaseDescription
) -> SavedHead:
    refuse_unserved(inner, known=_KNOWN, refused={})
    head_type = inner.get("head_type")
    kind = _KINDS.get(head_type) if isinstance(head_type, str) else None
    if kind is None:
        raise AdapterUnsupportedError(
            "head_type", f"'{shown(str(head_type))}' is not served; these are: {', '.join(_KINDS)}"
        )
    layers = _layers(adapter_name(config), inner, shapes)
    pooling = Pooling.ALL
    if kind is TaskKind.CLASSIFY:
        pooling = Pooling.FIRST
        if "use_pooler" not in inner:
            raise AdapterUnsupportedError(
                "use_pooler", "is missing; versions of the library differ in what that means"
            )
        if read_flag(inner, "use_pooler", False):
            layers = (_pooler(base), *layers)
    labels = _labels(inner, _num_outputs(inner, layers, shapes, base))
    if kind is TaskKind.SPAN and (count := check_layers(layers, shapes, base)) != 2:
        raise AdapterInvalidError("num_labels", f"is {count}; the ends of a span are 2")
    is_multilabel = head_type == "multilabel_classification"
    return SavedHead(kind, pooling, layers, labels, ScoreActivation.SIGMOID if is_multilabel else None)


def _pooler(base: BaseDescription) -> SavedLayer:
    if not base.has_pooler:
        raise AdapterInvalidError("use_pooler", "is set, and the base has no pooler")
    return SavedLayer(None, None, "tanh", is_base_s=True)


def _layers(name: str, inner: Mapping[str, Any], shapes: Mapping[str, Shape]) -> tuple[SavedLayer, ...]:
    """The linears in the order of their indices, with the activation between them."""
    pattern = re.compile(re.escape(f"heads.{name}.") + r"(\d{1,3})\.weight")
    found = sorted(int(match[1]) for tensor in shapes if (match := pattern.fullmatch(tensor)))
    count = read_count(inner, "layers", 1)
    if count > _MAX_LAYERS or len(found) != count:
        raise AdapterInvalidError("layers", f"is {count}; the file has {len(found)} layers heads.{name}.*")
    function = inner.get("activation_function")
    activation = None if function is None else activation_name("activation_function", function)
    has_bias = read_flag(inner, "bias", True)
    layers = []
    for index in found:
        is_last = index == found[-1]
        weight, bias = (f"heads.{name}.{index}.{part}" for part in ("weight", "bias"))
        if (bias in shapes) != (has_bias or not is_last):
            raise AdapterInvalidError(bias, "is there, or is not, contrary to the config")
        layers.append(SavedLayer(weight, bias if bias in shapes else None, None if is_last else activation))
    return tuple(layers)


def _num_outputs(
    config: Mapping[str, Any],
    layers: tuple[SavedLayer, ...],
    shapes: Mapping[str, Shape],
    base: BaseDescription,
) -> int:
    """The last layer's, which are as many as the config says."""
    count = check_layers(layers, shapes, base)
    if (recorded := read_count(config, "num_labels", count)) != count:
        raise AdapterInvalidError("num_labels", f"is {recorded}; the head has {count} outputs")
    return count


def _labels(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The names of the outputs; none if the config has none."""
    ids = config.get("label2id")
    if ids is None:
        return ()
    if not isinstance(ids, dict) or not all(type(index) is int for index in ids.values()):
        raise AdapterInvalidError("label2id", "must give each label's index")
    if sorted(ids.values()) != list(range(count)) or "" in ids:
        raise AdapterInvalidError("label2id", f"must name each of the head's {count} outputs once")
    return tuple(sorted(ids, key=lambda label: ids[label]))
