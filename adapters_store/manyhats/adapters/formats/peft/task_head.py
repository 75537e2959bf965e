"""Heads that PEFT saves for tasks that read a text: classes of texts, classes of tokens, spans.

PEFT trains a head as a whole and saves it beside the method's tensors; ``modules_to_save`` lists every name that it
might have had. With virtual tokens the name in the file has one ``model.`` less. Methods see neither: an artifact is
split into its head and the rest before they check or lower it.

A head's layers are those of transformers' models. BERT's begins with the base's pooler, and ModernBERT's with what
masked language modelling trained there; PEFT does not save them unless they are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from manyhats.adapters.errors import AdapterInvalidError, shown
from manyhats.adapters.formats.peft.tensors import PREFIX, Shape
from manyhats.adapters.formats.saved_head import SavedHead, alternatives, find_layers, pooling_of
from manyhats.adapters.heads import TaskKind
from manyhats.adapters.sites import BaseDescription

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
_SPAN_ENDS = 2
_LISTED = frozenset(("classifier", "score", "qa_outputs", "pre_classifier", "pooler", "head"))
"""What ``modules_to_save`` may name though the task's model has no such module."""


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
        return None if kind is None else SavedHead(kind, base.pooling, ())
    asking = "task_type", str(task_type)
    choices = alternatives(kind, base)
    layers = find_layers(asking, _PREFIXES, choices, shapes, base)
    last = layers[-1].weight
    if kind is TaskKind.SPAN and last is not None and shapes[last][0] != _SPAN_ENDS:
        raise AdapterInvalidError(
            last, f"has {shapes[last][0]} outputs; a span has {_SPAN_ENDS}, its start and its end"
        )
    if layers[0].weight is None:
        _check_unsaved(config, choices[0][0].module)
    return SavedHead(kind, pooling_of(kind, base), layers)


def _check_unsaved(config: Mapping[str, Any], module: str) -> None:
    """Refuse a config that says that the file has a layer of its own, where the base's would stand in for it."""
    listed = config.get("modules_to_save")
    for name in listed if isinstance(listed, list) else ():
        if isinstance(name, str) and _names(name, module):
            raise AdapterInvalidError(
                "modules_to_save", f"names {shown(name)}, but {PREFIX}{module}.weight is missing"
            )


def without_head(config: Mapping[str, Any], head: SavedHead) -> dict[str, Any]:
    """A config that says nothing of its task's head."""
    listed = config.get("modules_to_save")
    rest = {key: value for key, value in config.items() if key not in ("task_type", "modules_to_save")}
    if isinstance(listed, list):
        modules = {_module_of(name) for name in head.names}
        others = (name for name in listed if name not in _LISTED)
        own = [name for name in others if not any(_names(name, module) for module in modules)]
        rest["modules_to_save"] = own or None
    elif listed is not None:
        rest["modules_to_save"] = listed
    return rest


def _module_of(tensor: str) -> str:
    """The path of the module that a tensor of a head belongs to."""
    prefix = next(prefix for prefix in _PREFIXES if tensor.startswith(prefix))
    return tensor.removeprefix(prefix).rpartition(".")[0]


def _names(name: Any, module: str) -> bool:
    """Whether a name of ``modules_to_save`` means a module, or one that it is part of: the end of either's path."""
    segments = module.split(".")
    paths = (".".join(segments[:length]) for length in range(1, len(segments) + 1))
    return any(path == name or path.endswith(f".{name}") for path in paths)
