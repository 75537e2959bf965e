"""Heads in training: layers behind an adapter, in the shape and under the names that its library has for the base.

PEFT's are those of transformers' models, saved beside the adapter's tensors. AdapterHub's are flexible heads, in files
of their own; one of texts has two layers with a tanh between them, as the library adds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator, nn

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.formats.adapterhub.format import is_adapterhub
from manyhats.adapters.formats.peft.tensors import PREFIX
from manyhats.adapters.formats.saved_head import Part, alternatives
from manyhats.adapters.heads import TaskKind
from manyhats.adapters.lowering.lowering import ADAPTERHUB_METHODS, METHODS
from manyhats.adapters.sites import HEAD, BaseDescription
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.errors import BaseError, SettingError
from manyhats.trainer.methods.initialization import zeros
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.settings.settings import TrainSettings

_DEVIATION = 0.02
_BEHIND_VIRTUAL_TOKENS = "base_model."
_VIRTUAL = (AdapterMethod.PREFIX_TUNING, AdapterMethod.PROMPT_TUNING, AdapterMethod.P_TUNING)
_TASK_TYPES: Mapping[TaskKind, str] = MappingProxyType(
    {
        TaskKind.CLASSIFY: "SEQ_CLS",
        TaskKind.CLASSIFY_TOKENS: "TOKEN_CLS",
        TaskKind.EMBED: "FEATURE_EXTRACTION",
    }
)
_LISTED = ("classifier", "score")

# Families of which transformers has no model with such a head, so that PEFT could not load one.
_WITHOUT: Mapping[TaskKind, frozenset[str]] = MappingProxyType(
    {
        TaskKind.CLASSIFY: frozenset(("cohere", "cohere2", "granite")),
        TaskKind.CLASSIFY_TOKENS: frozenset(
            ("cohere", "cohere2", "gemma3_text", "gptj", "granite", "olmo2", "opt")
        ),
        TaskKind.EMBED: frozenset(),
    }
)
_TOKEN_CLASSIFIERS = frozenset(("falcon", "gpt2", "gpt_neox"))
"""Decoders that call their head of tokens ``classifier``; the others' is ``score``."""


def check_reads(settings: TrainSettings, base: BaseDescription) -> None:
    """Check that the base, with an adapter of this method, can do what the task is to do.

    Raises:
        BaseError: it is an encoder, which continues no text; or no library has such an adapter, or such a head, on it.
    """
    if settings.head.reads:
        check_head(settings.head.task_kind, settings.adapter.method, base)
        return
    if base.kind is TaskKind.EMBED:
        raise BaseError(
            f"{base.model_type} is an encoder, which continues no text: set `head` to classification, tokens or "
            "embedding"
        )
    _check_method(settings.adapter.method, base)


def check_head(kind: TaskKind, method: AdapterMethod, base: BaseDescription) -> None:
    """Check that a library has adapters of this method with a head of this kind on the base, and that it is served.

    Raises:
        BaseError: says why not.
    """
    _check_method(method, base)
    family = base.model_type
    if family in _WITHOUT[kind]:
        what = "texts" if kind is TaskKind.CLASSIFY else "tokens"
        raise BaseError(f"transformers has no {family} model with a head for classes of {what}")
    if kind is TaskKind.EMBED:
        return
    if method is AdapterMethod.BOTTLENECK:
        if base.kind is not TaskKind.EMBED:
            raise BaseError(
                f"heads beside bottlenecks are AdapterHub's, which are served on encoders, and {family} is none; "
                "train another method"
            )
        return
    for part in _peft_layers(kind, base):
        if part.is_base_s and not base.has_pooler:
            raise BaseError(
                f"a head of {family} reads the base's {part.module}, and this base has none; use one whose files "
                "have it"
            )


def _check_method(method: AdapterMethod, base: BaseDescription) -> None:
    methods = ADAPTERHUB_METHODS if method is AdapterMethod.BOTTLENECK else METHODS
    try:
        methods[method].check_base(base)
    except AdapterError as error:
        raise BaseError(error.description) from error


def with_head(
    adapter: ParametrizedAdapter, task: HeadTask, base: BaseDescription, generator: Generator
) -> ParametrizedAdapter:
    """An adapter with a fresh head: weights from N(0, 0.02²), biases 0.

    Args:
        adapter: without one.
        task: what it is to learn.
        base: whose hidden states it reads.
        generator: of the weights.

    Raises:
        SettingError: the adapter acts on the output head, which such a task does not have.
    """
    lm_head = base.path_of(HEAD)
    if lm_head and any(name.startswith(f"{PREFIX}{lm_head}.") for name in adapter.parameters):
        raise SettingError("target_modules", f"{lm_head} is not there where texts are read")
    if is_adapterhub(adapter.config):
        return adapter if task.kind is TaskKind.EMBED else _with_flexible_head(adapter, task, base, generator)
    config = {**adapter.config, "task_type": _TASK_TYPES[task.kind]}
    if task.kind is TaskKind.EMBED:
        return _without_head(replace(adapter, config=config), base)
    is_virtual = adapter.method in _VIRTUAL
    prefix = _BEHIND_VIRTUAL_TOKENS if is_virtual else PREFIX
    shapes = head_shapes(task, adapter.method, base)
    head = _fresh({prefix + name: shape for name, shape in shapes.items()}, generator)
    # PEFT lists every name that a head might have, and with virtual tokens twice.
    config["modules_to_save"] = [*_LISTED, *(_LISTED if is_virtual else ())]
    return replace(
        adapter, parameters={**adapter.parameters, **head}, config=config, head_names=frozenset(head)
    )


def _without_head(adapter: ParametrizedAdapter, base: BaseDescription) -> ParametrizedAdapter:
    """The adapter of a model without any head, whose paths of modules begin within what is the base's in others."""
    outer = f"{PREFIX}{base.prefix.partition('.')[0]}."

    def inner(name: str) -> str:
        return PREFIX + name.removeprefix(outer) if name.startswith(outer) else name

    return replace(
        adapter,
        parameters={inner(name): value for name, value in adapter.parameters.items()},
        learning_rate_scales={inner(name): scale for name, scale in adapter.learning_rate_scales.items()},
    )


def _peft_layers(kind: TaskKind, base: BaseDescription) -> tuple[Part, ...]:
    first, *others = alternatives(kind, base)
    if kind is TaskKind.CLASSIFY or base.kind is TaskKind.EMBED or base.model_type in _TOKEN_CLASSIFIERS:
        return first
    return others[0]


def head_shapes(task: HeadTask, method: AdapterMethod, base: BaseDescription) -> dict[str, tuple[int, ...]]:
    """The tensors of a head behind an adapter of this method: module's name and tensor's → shape; none for vectors."""
    if task.kind is TaskKind.EMBED:
        return {}
    has_bias = True
    if method is AdapterMethod.BOTTLENECK:
        # The index counts dropout, linear and activation.
        names = ["1", "4"] if task.kind is TaskKind.CLASSIFY else ["1"]
    else:
        names = [part.module for part in _peft_layers(task.kind, base) if not part.is_base_s]
        has_bias = task.kind is TaskKind.CLASSIFY_TOKENS or base.kind is TaskKind.EMBED
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        d_out = task.num_outputs if name == names[-1] else base.read_size
        shapes[f"{name}.weight"] = (d_out, base.read_size)
        if has_bias:
            shapes[f"{name}.bias"] = (d_out,)
    return shapes


def _fresh(shapes: Mapping[str, tuple[int, ...]], generator: Generator) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator) * _DEVIATION)
        if len(shape) > 1
        else zeros(*shape)
        for name, shape in shapes.items()
    }


def _with_flexible_head(
    adapter: ParametrizedAdapter, task: HeadTask, base: BaseDescription, generator: Generator
) -> ParametrizedAdapter:
    shapes = head_shapes(task, adapter.method, base)
    own = f"heads.{adapter.config['name']}."
    head = _fresh({own + name: shape for name, shape in shapes.items()}, generator)
    return replace(
        adapter,
        parameters={**adapter.parameters, **head},
        head_names=frozenset(head),
        head_config=_flexible_config(adapter, task, sum(len(shape) > 1 for shape in shapes.values())),
    )


def _flexible_config(adapter: ParametrizedAdapter, task: HeadTask, num_layers: int) -> dict[str, Any]:
    """``head_config.json`` as the library writes it."""
    is_of_texts = task.kind is TaskKind.CLASSIFY
    head_type = "classification" if is_of_texts else "tagging"
    if task.loss is Loss.BINARY_CROSS_ENTROPY:
        head_type = "multilabel_classification"
    labels = {label: index for index, label in enumerate(task.classes)}
    inner = {
        "activation_function": "tanh",
        "dropout_prob": None,
        "head_type": head_type,
        "label2id": labels or None,
        "layers": num_layers,
        "num_labels": task.num_outputs,
        **({"bias": True, "use_pooler": False} if is_of_texts else {}),
    }
    own = ("hidden_size", "model_class", "model_name", "model_type", "name", "version")
    return {"config": dict(sorted(inner.items())), **{key: adapter.config[key] for key in own}}
