"""Heads in files, of tasks that read a text: which layers transformers' models have, and where a file has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from manyhats.adapters.equations import affine
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.heads import HeadLayer, Pooling, ScoreActivation, TaskHead, TaskKind
from manyhats.adapters.primitives import Affine, Delta, InputScale, LayerNorm, LowRank
from manyhats.adapters.sites import POOLER, BaseDescription

Shape = tuple[int, ...]
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Part:
    """A layer by its module's path in the model.

    Attributes:
        norm: path of the norm behind it; None for none.
        is_base_s: whether the base's own, its pooler, serves where none is saved.
        is_biased: whether it has a bias in all models.
    """

    module: str
    activation: str | None = None
    norm: str | None = None
    is_base_s: bool = False
    is_biased: bool = True


_MODERNBERT = Part("head.dense", "gelu", norm="head.norm", is_base_s=True, is_biased=False)
_TWO_LAYERS = (Part("classifier.dense", "tanh"), Part("classifier.out_proj"))
_OF_TEXTS: Mapping[str, tuple[Part, ...]] = MappingProxyType(
    {
        "albert": (Part("albert.pooler", "tanh", is_base_s=True), Part("classifier")),
        "bert": (Part("bert.pooler.dense", "tanh", is_base_s=True), Part("classifier")),
        "distilbert": (Part("pre_classifier", "relu"), Part("classifier")),
        "electra": (Part("classifier.dense", "gelu"), Part("classifier.out_proj")),
        "modernbert": (_MODERNBERT, Part("classifier")),
        "roberta": _TWO_LAYERS,
        "xlm-roberta": _TWO_LAYERS,
        "camembert": _TWO_LAYERS,
    }
)
"""The layers that classify a text, of encoders by their ``model_type``; decoders have one."""
_IN_FRONT: Mapping[str, tuple[Part, ...]] = MappingProxyType({"modernbert": (_MODERNBERT,)})
"""What is in front of the one layer of other heads."""
_OF_SPANS: Mapping[str, str] = MappingProxyType({"modernbert": "classifier"})
"""What the layer is called that finds a span; ``qa_outputs`` elsewhere."""
_WITHOUT_SPANS = frozenset(("llama", "qwen2", "qwen3", "qwen3_moe", "smollm3"))
"""Families whose model for spans keeps its layers elsewhere than others do: it leaves out the base's weights."""


@dataclass(frozen=True, slots=True)
class SavedLayer:
    """A layer in a file: names of its tensors.

    Attributes:
        weight: None if it is the base's pooler.
        norm: of the weight and the bias of the norm behind it; None for none, or for the base's.
        is_base_s: whether what the file lacks of it is the base's.
    """

    weight: str | None
    bias: str | None
    activation: str | None
    norm: tuple[str, str | None] | None = None
    is_base_s: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of all its tensors."""
        names = (self.weight, self.bias, *(self.norm or ()))
        return tuple(name for name in names if name is not None)


@dataclass(frozen=True, slots=True)
class SavedHead:
    """A head in a file.

    Attributes:
        kind: what its task does.
        pooling: what it reads.
        layers: one after the other; none for an embedding.
        labels: of the last layer's outputs, if the file names them.
        activation: from these outputs to scores; None for what their number suggests.
    """

    kind: TaskKind
    pooling: Pooling
    layers: tuple[SavedLayer, ...]
    labels: tuple[str, ...] = ()
    activation: ScoreActivation | None = None

    @property
    def names(self) -> frozenset[str]:
        """Of all its tensors."""
        return frozenset(name for layer in self.layers for name in layer.names)

    def others(self, tensors: Mapping[str, V]) -> dict[str, V]:
        """The tensors, or their shapes, that are not its own."""
        return {name: value for name, value in tensors.items() if name not in self.names}

    def lower(
        self, tensors: Mapping[str, Tensor], base: BaseDescription, deltas: Sequence[Delta] = ()
    ) -> TaskHead:
        """The head as the engine applies it.

        Args:
            tensors: the file's.
            base: whose pooler it may begin with.
            deltas: of that pooler, which become part of the task's own copy.
        """
        for name in (layer.weight for layer in self.layers if layer.is_base_s):
            if name is not None and deltas:
                raise AdapterInvalidError(name, "is trained as a whole, and the adapter acts on it besides")
        layers = tuple(_lowered(layer, tensors, base, deltas) for layer in self.layers)
        num_labels = layers[-1].weight.shape[0] if layers else 0
        return TaskHead(
            kind=self.kind,
            pooling=self.pooling,
            layers=layers,
            labels=self.labels,
            activation=self.activation
            or (ScoreActivation.NONE if num_labels == 1 else ScoreActivation.SOFTMAX),
            skipped_token_id=base.pad_token_id if self.pooling is Pooling.LAST else None,
        )


def pooling_of(kind: TaskKind, base: BaseDescription) -> Pooling:
    """What a head of transformers' models reads."""
    if kind is not TaskKind.CLASSIFY:
        return Pooling.ALL
    return base.classifier_pooling if base.kind is TaskKind.EMBED else Pooling.LAST


def alternatives(kind: TaskKind, base: BaseDescription) -> Sequence[tuple[Part, ...]]:
    """The layers that a head of transformers' models may have; none if what it was trained on is not the base."""
    first = _IN_FRONT.get(base.model_type, ())
    if kind is TaskKind.SPAN and base.model_type in _WITHOUT_SPANS:
        return []
    if kind is TaskKind.SPAN:
        return [(*first, Part(_OF_SPANS.get(base.model_type, "qa_outputs")))]
    if kind is TaskKind.CLASSIFY and base.kind is TaskKind.EMBED:
        return [_OF_TEXTS.get(base.model_type, (Part("classifier"),))]
    if kind is TaskKind.CLASSIFY:
        return [(Part(name, is_biased=False),) for name in ("score", "classifier")]
    return [(*first, Part(name)) for name in ("classifier", "score")]


def find_layers(
    asking: tuple[str, str],
    prefixes: Sequence[str],
    choices: Sequence[tuple[Part, ...]],
    shapes: Mapping[str, Shape],
    base: BaseDescription,
) -> tuple[SavedLayer, ...]:
    """The layers of a head in a file, which fit the base.

    Args:
        asking: the config's key that asks for a head, and its value.
        prefixes: what the tensors' names may begin with.
        choices: the layers that it may have.
        shapes: tensor name → shape.
        base: whose rows it reads.

    Raises:
        AdapterInvalidError: a layer is missing, or does not fit.
        AdapterUnsupportedError: there are no layers that it may have.
    """
    key, value = asking
    if not choices:
        raise AdapterUnsupportedError(
            key,
            f"{value} is not served on {base.model_type}: transformers' model for it does not load the base's weights, "
            "so what it was trained on is lost",
        )
    for parts in choices:
        found = [_find(part, prefixes, shapes) for part in parts]
        if found[-1] is None:
            continue
        for part, layer in zip(parts, found, strict=True):
            _check_whole(asking, part, layer, base)
        layers = tuple(
            layer or SavedLayer(None, None, part.activation, is_base_s=True)
            for part, layer in zip(parts, found, strict=True)
        )
        check_layers(layers, shapes, base)
        return layers
    asked = [f"{prefix}{parts[-1].module}.weight" for parts in choices for prefix in prefixes]
    raise AdapterInvalidError(key, f"{value} needs a head, and the file has none of {', '.join(asked)}")


def _check_whole(
    asking: tuple[str, str], part: Part, layer: SavedLayer | None, base: BaseDescription
) -> None:
    """Check that the file has all of a layer, or the base has the rest."""
    key, value = asking
    missing = _missing(part, layer)
    if missing is not None and not part.is_base_s:
        raise AdapterInvalidError(key, f"{value} needs {missing}, which the file lacks")
    if missing is not None and not base.has_pooler:
        raise AdapterInvalidError(key, f"{value} needs {missing}, which neither the file nor the base has")
    if part.is_biased and layer is not None and layer.weight is not None and layer.bias is None:
        name = layer.weight.removesuffix("weight") + "bias"
        raise AdapterInvalidError(name, f"is missing beside {layer.weight}")


def check_layers(layers: Sequence[SavedLayer], shapes: Mapping[str, Shape], base: BaseDescription) -> int:
    """Check that each layer reads what the one before gives, the first the base's rows; returns the last's outputs.

    Raises:
        AdapterInvalidError: names the tensor.
    """
    size = base.read_size
    for layer in layers:
        size = _check_layer(layer, shapes, size)
    return size


def _find(part: Part, prefixes: Sequence[str], shapes: Mapping[str, Shape]) -> SavedLayer | None:
    """What the file has of a layer; None if that is nothing."""
    for prefix in prefixes:
        weight, bias = _pair(f"{prefix}{part.module}", shapes)
        norm, offset = (None, None) if part.norm is None else _pair(f"{prefix}{part.norm}", shapes)
        if weight is not None or norm is not None:
            own_norm = None if norm is None else (norm, offset)
            return SavedLayer(weight, bias, part.activation, own_norm, part.is_base_s)
    return None


def _pair(path: str, shapes: Mapping[str, Shape]) -> tuple[str | None, str | None]:
    """Names of a module's weight and bias; a bias without a weight is not its own."""
    weight, bias = f"{path}.weight", f"{path}.bias"
    if weight not in shapes:
        return None, None
    return weight, bias if bias in shapes else None


def _missing(part: Part, layer: SavedLayer | None) -> str | None:
    """The path of what the file lacks of a layer."""
    if layer is None or layer.weight is None:
        return part.module
    return part.norm if layer.norm is None else None


def _check_layer(layer: SavedLayer, shapes: Mapping[str, Shape], d_in: int) -> int:
    """Check a layer's shapes; returns how many outputs it has."""
    d_out = d_in  # the base's own
    if layer.weight is not None:
        shape = shapes[layer.weight]
        if len(shape) != 2 or shape[1] != d_in or not shape[0]:
            raise AdapterInvalidError(layer.weight, f"has shape {list(shape)}; expected [outputs, {d_in}]")
        d_out = d_in if layer.is_base_s and layer.norm is None else shape[0]
        if shape[0] != d_out:
            raise AdapterInvalidError(layer.weight, f"has shape {list(shape)}; expected [{d_out}, {d_in}]")
    for name in layer.names:
        if name != layer.weight and shapes[name] != (d_out,):
            raise AdapterInvalidError(name, f"has shape {list(shapes[name])}; expected [{d_out}]")
    return d_out


def _lowered(
    layer: SavedLayer, tensors: Mapping[str, Tensor], base: BaseDescription, deltas: Sequence[Delta]
) -> HeadLayer:
    needs_norm = layer.is_base_s and layer.norm is None and base.pooler_eps is not None
    if base.weights is None and (layer.weight is None or needs_norm):
        raise AdapterInvalidError("head", "begins with the base's pooler, which is not available")
    if layer.weight is not None:
        weight, bias = tensors[layer.weight].float(), None if layer.bias is None else tensors[layer.bias]
    else:
        assert base.weights is not None
        weight, bias = _with_deltas(*base.weights.linear(POOLER), deltas)
    norm = None
    if layer.norm is not None:
        scale, offset = layer.norm
        norm = _norm(tensors[scale], None if offset is None else tensors[offset], base)
    elif needs_norm:
        assert base.weights is not None
        norm = _norm(*base.weights.pooler_norm(), base)
    return HeadLayer(weight, bias, layer.activation, norm)


def _norm(weight: Tensor, bias: Tensor | None, base: BaseDescription) -> LayerNorm:
    """A norm in front of a classifier; its eps is the base's."""
    assert base.pooler_eps is not None  # families whose heads have a norm have one in front of their own
    bias = torch.zeros_like(weight) if bias is None else bias
    return LayerNorm(weight.float(), bias.float(), base.pooler_eps)


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
