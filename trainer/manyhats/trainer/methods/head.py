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
from manyhats.adapters.formats.adapterhub.format import is_adapterhub
from manyhats.adapters.formats.peft.tensors import PREFIX
from manyhats.adapters.formats.saved_head import Part, alternatives
from manyhats.adapters.heads import TaskKind
from manyhats.adapters.sites import HEAD, BaseDescription
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.errors import BaseError, SettingError
from manyhats.trainer.methods.initialization import zeros
from manyhats.trainer.methods.parametrized import ParametrizedAdapter

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


def check_head(kind: TaskKind, method: AdapterMethod, base: BaseDescription) -> None:
    """Check that a library has adapters of this method with a head of this kind on the base, and that it is served.

    Raises:
        BaseError: says why not.
    """
    family = base.model_type
    is_encoder = base.kind is TaskKind.EMBED
    if family in _WITHOUT[kind]:
        what = "texts" if kind is TaskKind.CLASSIFY else "tokens"
        raise BaseError(f"transformers has no {family} model with a head for classes of {what}")
    if method is AdapterMethod.BOTTLENECK and kind is not TaskKind.EMBED and not is_encoder:
        raise BaseError(
            f"heads beside bottlenecks are AdapterHub's, which are served on encoders, and {family} is none; train "
            "another method"
        )
    if method is AdapterMethod.PREFIX_TUNING and family == "distilbert":
        raise BaseError("PEFT has no prefix tuning on distilbert, which takes no past keys and values")
    if method in _VIRTUAL[1:] and is_encoder and base.embedding_size != base.hidden_size:
        raise BaseError(
            f"PEFT has no virtual embeddings on this {family}, whose embedding has {base.embedding_size} values a "
            f"token, and its layers {base.hidden_size}"
        )
    reads_pooler = kind is TaskKind.CLASSIFY and any(part.is_base_s for part in _peft_layers(kind, base))
    if method is not AdapterMethod.BOTTLENECK and reads_pooler and not base.has_pooler:
        raise BaseError(
            f"a head of {family} reads the base's pooler, and this base has none; use one whose files have it"
        )


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
    parameters = dict(adapter.parameters)
    config = {**adapter.config, "task_type": _TASK_TYPES[task.kind]}
    if task.kind is TaskKind.EMBED:
        # PEFT's model has no head, so that paths of modules begin within the base's.
        own = f"{PREFIX}{base.prefix}"
        parameters = {
            PREFIX + name.removeprefix(own) if name.startswith(own) else name: value
            for name, value in parameters.items()
        }
        scales = {
            PREFIX + name.removeprefix(own) if name.startswith(own) else name: scale
            for name, scale in adapter.learning_rate_scales.items()
        }
        return replace(adapter, parameters=parameters, config=config, learning_rate_scales=scales)
    is_virtual = adapter.method in _VIRTUAL
    prefix = _BEHIND_VIRTUAL_TOKENS if is_virtual else PREFIX
    head = _layers(
        [prefix + part.module for part in _peft_layers(task.kind, base) if not part.is_base_s],
        base.read_size,
        task.num_outputs,
        generator,
        has_bias=task.kind is TaskKind.CLASSIFY_TOKENS or base.kind is TaskKind.EMBED,
    )
    # PEFT lists every name that a head might have, and with virtual tokens twice.
    config["modules_to_save"] = [*_LISTED, *(_LISTED if is_virtual else ())]
    return replace(adapter, parameters={**parameters, **head}, config=config, head_names=frozenset(head))


def _peft_layers(kind: TaskKind, base: BaseDescription) -> tuple[Part, ...]:
    first, *others = alternatives(kind, base)
    if kind is TaskKind.CLASSIFY or base.kind is TaskKind.EMBED or base.model_type in _TOKEN_CLASSIFIERS:
        return first
    return others[0]


def _layers(
    names: list[str], d_in: int, num_outputs: int, generator: Generator, *, has_bias: bool
) -> dict[str, nn.Parameter]:
    """Linears one behind the other, all but the last as wide as what they read."""
    made: dict[str, nn.Parameter] = {}
    for name in names:
        d_out = num_outputs if name == names[-1] else d_in
        made[f"{name}.weight"] = nn.Parameter(torch.randn(d_out, d_in, generator=generator) * _DEVIATION)
        if has_bias:
            made[f"{name}.bias"] = zeros(d_out)
    return made


def _with_flexible_head(
    adapter: ParametrizedAdapter, task: HeadTask, base: BaseDescription, generator: Generator
) -> ParametrizedAdapter:
    name = adapter.config["name"]
    is_of_texts = task.kind is TaskKind.CLASSIFY
    # The index counts dropout, linear and activation.
    indices = (1, 4) if is_of_texts else (1,)
    names = [f"heads.{name}.{index}" for index in indices]
    head = _layers(names, base.read_size, task.num_outputs, generator, has_bias=True)
    return replace(
        adapter,
        parameters={**adapter.parameters, **head},
        head_names=frozenset(head),
        head_config=_flexible_config(adapter, task, len(indices)),
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
