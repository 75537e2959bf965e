"""Heads that PEFT saves for tasks that read a text: classes of texts, classes of tokens, spans.

PEFT trains a head as a whole and saves it beside the method's tensors; ``modules_to_save`` lists every name that it
might have had. With virtual tokens the name in the file has one ``model.`` less. Methods see neither: an artifact is
split into its head and the rest before they check or lower it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from manyhats.adapters.errors import AdapterInvalidError
from manyhats.adapters.formats.peft.tensors import PREFIX, Shape
from manyhats.adapters.heads import HeadLayer, Pooling, ScoreActivation, TaskHead, TaskKind
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
_MODULES = {
    TaskKind.CLASSIFY: ("score", "classifier"),
    TaskKind.CLASSIFY_TOKENS: ("classifier", "score"),
    TaskKind.SPAN: ("qa_outputs",),
    TaskKind.EMBED: (),
}
_NAMES = frozenset(("classifier", "score", "qa_outputs"))
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class SavedHead:
    """A head in a file.

    Attributes:
        kind: what its task does.
        weight: name of its tensor [labels, E]; None for an embedding, which has none.
        bias: name of its tensor [labels]; None for none.
    """

    kind: TaskKind
    weight: str | None
    bias: str | None

    def others(self, tensors: Mapping[str, V]) -> dict[str, V]:
        """The tensors, or their shapes, that are not its own."""
        return {name: value for name, value in tensors.items() if name not in (self.weight, self.bias)}

    def lower(self, tensors: Mapping[str, Tensor], base: BaseDescription) -> TaskHead:
        """The head as the engine applies it."""
        if self.weight is None:
            return TaskHead(self.kind, base.pooling, ())
        layer = HeadLayer(tensors[self.weight], None if self.bias is None else tensors[self.bias])
        is_of_text = self.kind is TaskKind.CLASSIFY
        return TaskHead(
            kind=self.kind,
            pooling=Pooling.LAST if is_of_text else Pooling.ALL,
            layers=(layer,),
            activation=ScoreActivation.NONE if layer.weight.shape[0] == 1 else ScoreActivation.SOFTMAX,
            skipped_token_id=base.pad_token_id if is_of_text else None,
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
    if kind is None:
        return None
    if kind is TaskKind.EMBED:
        return SavedHead(kind, None, None)
    paths = [f"{prefix}{module}" for module in _MODULES[kind] for prefix in _PREFIXES]
    path = next((path for path in paths if f"{path}.weight" in shapes), None)
    if path is None:
        asked = ", ".join(f"{path}.weight" for path in paths)
        raise AdapterInvalidError("task_type", f"{task_type} needs a head, and the file has none of {asked}")
    weight, bias = f"{path}.weight", f"{path}.bias"
    size = base.embedding_size
    if len(shapes[weight]) != 2 or shapes[weight][1] != size or not shapes[weight][0]:
        raise AdapterInvalidError(weight, f"has shape {list(shapes[weight])}; expected [labels, {size}]")
    if bias in shapes and shapes[bias] != shapes[weight][:1]:
        raise AdapterInvalidError(bias, f"has shape {list(shapes[bias])}; expected [{shapes[weight][0]}]")
    return SavedHead(kind, weight, bias if bias in shapes else None)


def without_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of its task's head."""
    listed = config.get("modules_to_save")
    rest = {key: value for key, value in config.items() if key not in ("task_type", "modules_to_save")}
    if isinstance(listed, list):
        rest["modules_to_save"] = [name for name in listed if name not in _NAMES] or None
    elif listed is not None:
        rest["modules_to_save"] = listed
    return rest
