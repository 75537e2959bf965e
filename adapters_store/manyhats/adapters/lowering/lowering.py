"""From an artifact to the primitives that the engine runs; one entry per method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.formats.adapterhub.format import is_adapterhub
from manyhats.adapters.formats.adapterhub.task_head import find_head as find_adapterhub_head
from manyhats.adapters.formats.peft.task_head import find_head, without_head
from manyhats.adapters.heads import TaskHead, TaskKind
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate, Method
from manyhats.adapters.methods.adalora import AdaLoraMethod
from manyhats.adapters.methods.bottleneck import BottleneckMethod, can_change_output
from manyhats.adapters.methods.dora import DoraMethod
from manyhats.adapters.methods.ia3 import AdapterHubIa3Method, Ia3Method
from manyhats.adapters.methods.lora import AdapterHubLoraMethod, LoraMethod
from manyhats.adapters.methods.multitask_prompt_tuning import MultitaskPromptTuningMethod
from manyhats.adapters.methods.p_tuning import PTuningMethod
from manyhats.adapters.methods.prefix_tuning import AdapterHubPrefixMethod, PrefixTuningMethod
from manyhats.adapters.methods.prompt_tuning import AdapterHubPromptMethod, PromptTuningMethod
from manyhats.adapters.methods.reft import ReftMethod
from manyhats.adapters.methods.trainable_tokens import TrainableTokensMethod
from manyhats.adapters.methods.union import UnionMethod
from manyhats.adapters.methods.vera import VeraMethod
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    Delta,
    EmbeddingLowRank,
    InputScale,
    KVPrefix,
    LoweredAdapter,
    LowRank,
    PrefixGate,
    PromptEmbeddings,
    num_tokens,
)
from manyhats.adapters.sites import POOLER, BaseDescription, Site


def _by_name(*methods: Method) -> Mapping[AdapterMethod, Method]:
    return MappingProxyType({method.method: method for method in methods})


# The methods of PEFT's directories.
METHODS: Mapping[AdapterMethod, Method] = _by_name(
    LoraMethod(),
    DoraMethod(),
    AdaLoraMethod(),
    VeraMethod(),
    Ia3Method(),
    PrefixTuningMethod(),
    PromptTuningMethod(),
    PTuningMethod(),
    MultitaskPromptTuningMethod(),
    TrainableTokensMethod(),
)

_OF_UNIONS = _by_name(
    BottleneckMethod(),
    AdapterHubLoraMethod(),
    AdapterHubIa3Method(),
    AdapterHubPrefixMethod(),
    AdapterHubPromptMethod(),
    ReftMethod(),
)

# The methods of AdapterHub's.
ADAPTERHUB_METHODS: Mapping[AdapterMethod, Method] = _by_name(*_OF_UNIONS.values(), UnionMethod(_OF_UNIONS))


def method_of(method: AdapterMethod, config: Mapping[str, Any]) -> Method:
    """The implementation of a method, in the format of ``config``.

    Raises:
        AdapterUnsupportedError: there is none.
    """
    methods, library = (ADAPTERHUB_METHODS, "AdapterHub") if is_adapterhub(config) else (METHODS, "PEFT")
    if method not in methods:
        raise AdapterUnsupportedError("method", f"{method.value} adapters of {library} are not served")
    return methods[method]


def check(candidate: Candidate, method: Method, base: BaseDescription, limits: AdapterLimits) -> None:
    """Refuse what could not be served exactly, before any tensor is read.

    Raises:
        ArtifactError, BaseMismatchError: as ``lower``.
    """
    if candidate.head_config is not None:
        find_adapterhub_head(candidate.head_config, candidate.head_shapes, base)
    head = find_head(candidate.config, candidate.shapes, base)
    if head is not None:
        config, shapes = without_head(candidate.config, head), head.others(candidate.shapes)
        candidate, base = replace(candidate, config=config, shapes=shapes), base.for_reading()
    method.check(candidate, base, limits)


def lower(artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
    """The artifact as primitives of the base's sites, and its task's head if it has one.

    Raises:
        ArtifactError: it cannot be served exactly; registration refuses it with the same error.
        BaseMismatchError: it was made for another base.
    """
    method = method_of(artifact.method, artifact.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
    head = find_head(artifact.config, shapes, base)
    if head is None:
        lowered, of_pooler = _without_pooler(_of_base(method.lower(artifact, base), base))
        return replace(lowered, head=_own_head(artifact, base, of_pooler))
    config, tensors = without_head(artifact.config, head), head.others(artifact.tensors)
    lowered, of_pooler = _without_pooler(
        _of_base(method.lower(replace(artifact, config=config, tensors=tensors), base.for_reading()), base)
    )
    task_head = head.lower(artifact.tensors, base, of_pooler)
    if isinstance(lowered.prefix, PromptEmbeddings):
        # Virtual tokens make PEFT's model read embeddings, among which it knows no padding.
        task_head = replace(task_head, skipped_token_id=None)
    return replace(lowered, head=task_head)


def _without_pooler(lowered: LoweredAdapter) -> tuple[LoweredAdapter, tuple[Delta, ...]]:
    """An adapter, and what it does to the base's pooler: that is part of a head, and of nothing else."""
    of_pooler = tuple(delta for delta in lowered.deltas if _acts_on_pooler(delta))
    others = tuple(delta for delta in lowered.deltas if not _acts_on_pooler(delta))
    return replace(lowered, deltas=others), of_pooler


def _acts_on_pooler(delta: Delta) -> bool:
    return isinstance(delta, LowRank | Affine | InputScale) and delta.site == POOLER


def _own_head(
    artifact: AdapterArtifact, base: BaseDescription, of_pooler: Sequence[Delta]
) -> TaskHead | None:
    """The head in files of its own, or else what the base does with a text; None if it generates."""
    if artifact.head_config is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in artifact.head_tensors.items()}
        head = find_adapterhub_head(artifact.head_config, shapes, base)
        return head.lower(artifact.head_tensors, base, of_pooler)
    return None if base.kind is TaskKind.GENERATE else TaskHead(base.kind, base.pooling, ())


def _of_base(lowered: LoweredAdapter, base: BaseDescription) -> LoweredAdapter:
    """What a method made of an artifact, in every layer that runs the weights it acts on, and with its vocabulary."""
    return _with_vocabulary(_in_every_layer(lowered, base), base)


def _in_every_layer(lowered: LoweredAdapter, base: BaseDescription) -> LoweredAdapter:
    if not base.shared:
        return lowered
    prefix = lowered.prefix
    if isinstance(prefix, KVPrefix):
        layers = list(base.shared)
        prefix = replace(prefix, keys=prefix.keys[layers], values=prefix.values[layers])
    deltas: list[Delta] = []
    for delta in lowered.deltas:
        if (
            not isinstance(delta, LowRank | Affine | InputScale | Bottleneck | PrefixGate)
            or delta.site.layer < 0
        ):
            deltas.append(delta)
            continue
        sites = (
            Site(layer, delta.site.name) for layer, own in enumerate(base.shared) if own == delta.site.layer
        )
        deltas += (replace(delta, site=site) for site in sites)
    return replace(lowered, deltas=tuple(deltas), prefix=prefix)


def _with_vocabulary(lowered: LoweredAdapter, base: BaseDescription) -> LoweredAdapter:
    size = num_tokens(lowered.deltas, base.vocab_size)
    return lowered if size == base.vocab_size else replace(lowered, vocab_size=size)


def check_lowered(lowered: LoweredAdapter) -> None:
    """Refuse constants that are not finite although the tensors are, such as a product that overflows.

    Raises:
        AdapterInvalidError: names the place.
        AdapterUnsupportedError: what counts a text's rows meets virtual tokens among them.
    """
    has_inner_prompt = isinstance(lowered.prefix, PromptEmbeddings) and not lowered.prefix.are_read
    if has_inner_prompt and any(isinstance(each, Bottleneck) and each.ends for each in lowered.deltas):
        raise AdapterUnsupportedError(
            "combine", "puts the prompt behind the first token, and ReFT would count its rows from there"
        )
    for delta in lowered.deltas:
        if not _is_finite(delta):
            place = getattr(delta, "site", "embedding or head")
            raise AdapterInvalidError(str(place), "what it computes here with this base is not finite")
    if lowered.head is not None and not all(is_finite(tensor) for tensor in lowered.head.tensors):
        raise AdapterInvalidError("head", "has values that are not finite")
    if lowered.prefix is not None and not _is_finite(lowered.prefix):
        raise AdapterInvalidError("virtual tokens", "the values computed for them are not finite")


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is; the extremes tell, which are NaN if any value is, in a tenth of the time."""
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in tensor.aminmax())


def _is_finite(primitive: Delta | KVPrefix | PromptEmbeddings) -> bool:
    values = (getattr(primitive, field.name) for field in fields(primitive))
    return all(
        is_finite(value) if isinstance(value, Tensor) else math.isfinite(value)
        for value in values
        if isinstance(value, Tensor | float)
    )


def has_effect(lowered: LoweredAdapter) -> bool:
    """Whether anything in it can change an output, judging by its own numbers."""
    has_head = lowered.head is not None and bool(lowered.head.layers)
    return has_head or lowered.prefix is not None or any(_can_change(delta) for delta in lowered.deltas)


def _can_change(delta: Delta) -> bool:
    if isinstance(delta, LowRank | EmbeddingLowRank):
        return delta.scale != 0 and _has_non_zero(delta.a) and _has_non_zero(delta.b)
    if isinstance(delta, Affine):
        is_scaled = delta.scale is not None and _has_non_zero(delta.scale - 1)
        return is_scaled or (delta.offset is not None and _has_non_zero(delta.offset))
    if isinstance(delta, InputScale):
        return _has_non_zero(delta.scale - 1)
    if isinstance(delta, Bottleneck):
        return can_change_output(delta)
    return True


def _has_non_zero(tensor: Tensor) -> bool:
    return bool(torch.any(tensor != 0))
