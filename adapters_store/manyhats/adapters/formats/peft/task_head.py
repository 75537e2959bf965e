"""Heads that PEFT saves for tasks that read a text: classes of texts, classes of tokens, spans.

PEFT trains a head as a whole and saves it beside the method's tensors; ``modules_to_save`` lists every name that it
might have had. With virtual tokens the name in the file has one ``model.`` less. Methods see neither: an artifact is
split into its head and the rest before they check or lower it.

A head's layers are those of transformers' models. BERT's begins with the base's pooler, which PEFT does not save unless
it is listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from manyhats.adapters.equations import affine
from manyhats.adapters.errors import AdapterInvalidError
from manyhats.adapters.formats.peft.tensors import PREFIX, Shape
from manyhats.adapters.heads import HeadLayer, Pooling, ScoreActivation, TaskHead, TaskKind
from manyhats.adapters.primitives import Affine, Delta, InputScale, LowRank
from manyhats.adapters.sites import POOLER, BaseDescription

KINDS: Mapping[str, TaskKind] = MappingProxyType(
    {
        "SEQ_CLS": TaskKind.CLASSIFY,
        "TOKEN_CLS": TaskKind.CLASSIFY_TOKENS,
        "QUESTION_ANS": TaskKind.SPAN,
        "FEATURE_EXTRACTION": TaskKind.EMBED,
    }
)
"""``task_type`` → what the task does; those that are not here generate."""

_PREFIXES = (PREFIX, "base_model.")
_LISTED = frozenset(("classifier", "score", "qa_outputs", "pre_classifier", "pooler"))
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class _Part:
    """A layer by its module's path in the model; ``is_base_s`` is whether the base's own serves where none is saved."""

    module: str
    activation: str | None = None
    is_base_s: bool = False


_TWO_LAYERS = (_Part("classifier.dense", "tanh"), _Part("classifier.out_proj"))
_OF_TEXTS: Mapping[str, tuple[_Part, ...]] = MappingProxyType(
    {
        "bert": (_Part("bert.pooler.dense", "tanh", is_base_s=True), _Part("classifier")),
        "distilbert": (_Part("pre_classifier", "relu"), _Part("classifier")),
        "electra": (_Part("classifier.dense", "gelu"), _Part("classifier.out_proj")),
        "roberta": _TWO_LAYERS,
        "xlm-roberta": _TWO_LAYERS,
        "camembert": _TWO_LAYERS,
    }
)
"""The layers that classify a text, of encoders by their ``model_type``; decoders have one."""


@dataclass(frozen=True, slots=True)
class _SavedLayer:
    """A layer in a file: names of its tensors; of the weight, None if it is the base's pooler."""

    weight: str | None
    bias: str | None
    activation: str | None


@dataclass(frozen=True, slots=True)
class SavedHead:
    """A head in a file.

    Attributes:
        kind: what its task does.
        pooling: what it reads.
        layers: one after the other; none for an embedding.
        names: of all its tensors.
    """

    kind: TaskKind
    pooling: Pooling
    layers: tuple[_SavedLayer, ...]
    names: frozenset[str]

    def others(self, tensors: Mapping[str, V]) -> dict[str, V]:
        """The tensors, or their shapes, that are not its own."""
        return {name: value for name, value in tensors.items() if name not in self.names}

    def lower(
        self, tensors: Mapping[str, Tensor], base: BaseDescription, deltas: Sequence[Delta]
    ) -> TaskHead:
        """The head as the engine applies it.

        Args:
            tensors: the artifact's.
            base: whose pooler it may begin with.
            deltas: of that pooler, which become part of the task's own copy.
        """
        layers = tuple(_lowered(layer, tensors, base, deltas) for layer in self.layers)
        num_labels = layers[-1].weight.shape[0] if layers else 0
        return TaskHead(
            kind=self.kind,
            pooling=self.pooling,
            layers=layers,
            activation=ScoreActivation.NONE if num_labels == 1 else ScoreActivation.SOFTMAX,
            skipped_token_id=base.pad_token_id if self.pooling is Pooling.LAST else None,
        )


def find_head(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], base: BaseDescription
) -> SavedHead | None:
    """The head in a file; None if its task generates.

    Raises:
        AdapterInvalidError: there is none though the task needs one, or it does not fit the base.
    """
    task_type = config.get("task_type")
    kind = KINDS.get(task_type) if isinstance(task_type, str) else None
    if kind is None or kind is TaskKind.EMBED:
        return None if kind is None else SavedHead(kind, base.pooling, (), frozenset())
    layers = _find_layers(str(task_type), _alternatives(kind, base), shapes, base)
    size = base.read_size
    for layer in layers:
        size = _check_layer(layer, shapes, size)
    is_of_text = kind is TaskKind.CLASSIFY
    pooling = Pooling.ALL
    if is_of_text:
        pooling = Pooling.FIRST if base.kind is TaskKind.EMBED else Pooling.LAST
    names = frozenset(name for layer in layers for name in (layer.weight, layer.bias) if name is not None)
    return SavedHead(kind, pooling, layers, names)


def without_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of its task's head."""
    listed = config.get("modules_to_save")
    rest = {key: value for key, value in config.items() if key not in ("task_type", "modules_to_save")}
    if isinstance(listed, list):
        rest["modules_to_save"] = [name for name in listed if name not in _LISTED] or None
    elif listed is not None:
        rest["modules_to_save"] = listed
    return rest


def _alternatives(kind: TaskKind, base: BaseDescription) -> Sequence[tuple[_Part, ...]]:
    """The layers that a head may have."""
    if kind is TaskKind.SPAN:
        return [(_Part("qa_outputs"),)]
    if kind is TaskKind.CLASSIFY and base.kind is TaskKind.EMBED:
        return [_OF_TEXTS.get(base.model_type, (_Part("classifier"),))]
    names = ("score", "classifier") if kind is TaskKind.CLASSIFY else ("classifier", "score")
    return [(_Part(name),) for name in names]


def _find_layers(
    task_type: str,
    alternatives: Sequence[tuple[_Part, ...]],
    shapes: Mapping[str, Shape],
    base: BaseDescription,
) -> tuple[_SavedLayer, ...]:
    for parts in alternatives:
        found = [_find(part, shapes) for part in parts]
        if found[-1] is None:
            continue
        for part, layer in zip(parts, found, strict=True):
            if layer is None and not part.is_base_s:
                raise AdapterInvalidError(
                    "task_type", f"{task_type} needs {part.module}, which the file lacks"
                )
            if layer is None and not base.has_pooler:
                raise AdapterInvalidError(
                    "task_type", f"{task_type} needs {part.module}, which neither the file nor the base has"
                )
        return tuple(
            layer or _SavedLayer(None, None, part.activation)
            for part, layer in zip(parts, found, strict=True)
        )
    asked = [f"{prefix}{parts[-1].module}.weight" for parts in alternatives for prefix in _PREFIXES]
    raise AdapterInvalidError(
        "task_type", f"{task_type} needs a head, and the file has none of {', '.join(asked)}"
    )


def _find(part: _Part, shapes: Mapping[str, Shape]) -> _SavedLayer | None:
    for prefix in _PREFIXES:
        weight, bias = f"{prefix}{part.module}.weight", f"{prefix}{part.module}.bias"
        if weight in shapes:
            return _SavedLayer(weight, bias if bias in shapes else None, part.activation)
    return None


def _check_layer(layer: _SavedLayer, shapes: Mapping[str, Shape], d_in: int) -> int:
    """Check a layer's shapes; returns how many outputs it has."""
    if layer.weight is None:
        return d_in
    shape = shapes[layer.weight]
    if len(shape) != 2 or shape[1] != d_in or not shape[0]:
        raise AdapterInvalidError(layer.weight, f"has shape {list(shape)}; expected [outputs, {d_in}]")
    if layer.bias is not None and shapes[layer.bias] != shape[:1]:
        raise AdapterInvalidError(layer.bias, f"has shape {list(shapes[layer.bias])}; expected [{shape[0]}]")
    return shape[0]


def _lowered(
    layer: _SavedLayer, tensors: Mapping[str, Tensor], base: BaseDescription, deltas: Sequence[Delta]
) -> HeadLayer:
    if layer.weight is not None:
        bias = None if layer.bias is None else tensors[layer.bias]
        return HeadLayer(tensors[layer.weight], bias, layer.activation)
    if base.weights is None:
        raise AdapterInvalidError(
            "task_type", "the head begins with the base's pooler, which is not available"
        )
    return HeadLayer(*_with_deltas(*base.weights.linear(POOLER), deltas), layer.activation)


def _with_deltas(
    weight: Tensor, bias: Tensor | None, deltas: Sequence[Delta]
) -> tuple[Tensor, Tensor | None]:
    """A linear as its deltas change it, in the order that ``primitives`` states."""
    for delta in deltas:
        if isinstance(delta, InputScale):
            weight = weight * delta.scale.float()
    for delta in deltas:
        if isinstance(delta, Affine):
            zero = weight.new_zeros(weight.shape[0])
            bias = affine(zero if bias is None else bias, delta)
            weight = affine(weight.T, replace(delta, offset=None)).T
    for delta in deltas:
        if isinstance(delta, LowRank):
            weight = weight + delta.scale * (delta.b.float() @ delta.a.float())
    return weight, bias
