"""What PEFT trains besides a method: whole embeddings and heads, and single token rows.

``modules_to_save`` names modules that are trained as a whole. ``trainable_token_indices`` trains single rows of the
embedding, or of the head; the file holds the rows themselves, not differences.

If the base's head is its embedding, PEFT keeps one of the two unchanged, unless told otherwise:

- a module of ``modules_to_save`` is a copy of its own; with ``ensure_weight_tying`` both get it;
- a weight that is saved without being named there replaces the base's, and so acts on both;
- token rows of the embedding act on both, unless the config gives the head other rows.

An embedding or head that a method adapts is saved alongside, unchanged, and PEFT loads it over the base's own: so it
must hold the base's values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError, BaseMismatchError, shown
from manyhats.adapters.formats.config_fields import parse_flag
from manyhats.adapters.formats.peft.tensors import (
    EMBEDDING_MODULE,
    HEAD_MODULE,
    PREFIX,
    Shape,
    unusable,
)
from manyhats.adapters.primitives import Delta, EmbeddingRows, HeadRows, HeadWeight
from manyhats.adapters.sites import HEAD, BaseDescription

SAVED_FIELDS = frozenset(("modules_to_save", "trainable_token_indices", "ensure_weight_tying"))
"""Config fields that this file reads."""

EMBEDDING_WEIGHT = f"{PREFIX}{EMBEDDING_MODULE}.weight"
HEAD_WEIGHT = f"{PREFIX}{HEAD_MODULE}.weight"

_MODULES = {"embed_tokens": EMBEDDING_MODULE, EMBEDDING_MODULE: EMBEDDING_MODULE, HEAD_MODULE: HEAD_MODULE}
# Relative, for values that were rounded to bfloat16 on one side only.
_BF16_ROUNDING = 2.0**-7
_ROW_SUFFIXES = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Trained rows: the tensor's name, and the tokens that its rows belong to."""

    tensor: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavedModules:
    """What a file holds besides its method's own tensors.

    Attributes:
        embedding, head: names of tensors that replace the whole weight; None if it is the base's.
        embedding_rows, head_rows: the same for single rows.
        copies: module path → name of an adapted module's own weight, saved alongside.
        names: all these tensors.
        must_be_equal: whether ``embedding`` and ``head`` are one weight saved twice.
    """

    embedding: str | None
    head: str | None
    embedding_rows: TokenRows | None
    head_rows: TokenRows | None
    copies: Mapping[str, str]
    names: frozenset[str]
    must_be_equal: bool = False

    def others(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """All other tensors."""
        return {name: shape for name, shape in shapes.items() if name not in self.names}

    def check_modules(self, adapted: Collection[str]) -> None:
        """Check these tensors against the modules that the method adapts.

        Raises:
            AdapterInvalidError: a module is adapted and replaced as well, which PEFT itself does not allow.
            AdapterUnsupportedError: the weight of a module that is not adapted was saved as if it were.
        """
        replaced = {
            EMBEDDING_MODULE: self.embedding or self.embedding_rows,
            HEAD_MODULE: self.head or self.head_rows,
        }
        for module, by in replaced.items():
            if module in adapted and by is not None:
                raise AdapterInvalidError(module, "is adapted, and also replaced by trained rows or weights")
        for module, name in self.copies.items():
            if module not in adapted:
                raise unusable(name)

    def lower(self, tensors: Mapping[str, Tensor], base: BaseDescription) -> tuple[Delta, ...]:
        """The rows and weights as primitives; a whole embedding is all of its rows.

        Raises:
            AdapterInvalidError: a weight that is one for embedding and head was saved with two values.
            BaseMismatchError: a weight that was saved alongside is not the base's.
        """
        self._check_copies(tensors, base)
        if self.must_be_equal and not torch.equal(tensors[EMBEDDING_WEIGHT], tensors[HEAD_WEIGHT]):
            raise AdapterInvalidError(HEAD_WEIGHT, "differs from the embedding that it is tied to")
        deltas: list[Delta] = []
        if self.embedding is not None:
            weight = tensors[self.embedding]
            deltas.append(EmbeddingRows(torch.arange(weight.shape[0]), weight))
        if self.embedding_rows is not None:
            rows = self.embedding_rows
            deltas.append(EmbeddingRows(torch.tensor(rows.ids), tensors[rows.tensor]))
        if self.head is not None:
            deltas.append(HeadWeight(tensors[self.head]))
        if self.head_rows is not None:
            rows = self.head_rows
            deltas.append(HeadRows(torch.tensor(rows.ids), tensors[rows.tensor]))
        return tuple(deltas)

    def _check_copies(self, tensors: Mapping[str, Tensor], base: BaseDescription) -> None:
        """Compare values where the base's are available: those of the head, and so of a tied embedding."""
        for module, name in self.copies.items():
            if base.weights is None or not (base.is_tied or module == HEAD_MODULE):
                continue
            own, _ = base.weights.linear(HEAD)
            if not torch.allclose(tensors[name].float(), own, rtol=_BF16_ROUNDING, atol=1e-6):
                raise BaseMismatchError(name, "was saved alongside, and its values differ from the base's")


def find_saved_modules(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], base: BaseDescription
) -> SavedModules:
    """Find and check what the file holds besides its method's own tensors.

    Raises:
        AdapterUnsupportedError: a module that is neither embedding nor head.
        AdapterInvalidError: a tensor is missing, or has another shape than the base's.
    """
    listed = _listed_modules(config)
    whole = {module: f"{PREFIX}{module}.weight" for module in (EMBEDDING_MODULE, HEAD_MODULE)}
    present = {module: name for module, name in whole.items() if name in shapes}
    for module in listed:
        if module not in present:
            raise AdapterInvalidError("modules_to_save", f"names {module}, but {whole[module]} is missing")
    copies = {module: f"{PREFIX}{module}.base_layer.weight" for module in whole}
    copies = {module: name for module, name in copies.items() if name in shapes}
    for name in (*present.values(), *copies.values()):
        _check_shape(name, shapes[name], (base.vocab_size, base.hidden_size))
    rows = _find_rows(config, shapes, base)
    for module, found in rows.items():
        for other in (EMBEDDING_MODULE, HEAD_MODULE) if base.is_tied else (module,):
            if other in present:
                raise AdapterInvalidError(found.tensor, f"and {present[other]} both replace the same rows")
    is_one = base.is_tied and _acts_on_both(config, present, listed)
    first = next(iter(present.values()), None)
    embedding_rows, head_rows = rows.get(EMBEDDING_MODULE), rows.get(HEAD_MODULE)
    if base.is_tied and head_rows is None and HEAD_MODULE not in present:
        head_rows = embedding_rows
    return SavedModules(
        embedding=first if is_one else present.get(EMBEDDING_MODULE),
        head=first if is_one else present.get(HEAD_MODULE),
        embedding_rows=embedding_rows,
        head_rows=head_rows,
        copies=copies,
        names=frozenset((*present.values(), *copies.values(), *(found.tensor for found in rows.values()))),
        must_be_equal=is_one and len(present) == 2,
    )


def _acts_on_both(config: Mapping[str, Any], present: Collection[str], listed: Collection[str]) -> bool:
    """Whether a tied base's embedding and head stay one weight."""
    is_ensured = parse_flag("ensure_weight_tying", config.get("ensure_weight_tying"))
    return bool(present) and (is_ensured or not set(present) <= set(listed))


def _listed_modules(config: Mapping[str, Any]) -> frozenset[str]:
    """``modules_to_save`` as module paths."""
    names = config.get("modules_to_save") or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise AdapterInvalidError("modules_to_save", "must be a list of module names")
    for name in names:
        if name not in _MODULES:
            raise AdapterUnsupportedError(
                "modules_to_save",
                f"'{shown(name)}' is trained as a whole; only lm_head and embed_tokens are served",
            )
    return frozenset(_MODULES[name] for name in names)


def _find_rows(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], base: BaseDescription
) -> dict[str, TokenRows]:
    """Module path → its trained rows, for each tensor that the config makes PEFT save."""
    wanted = _parse_indices(config.get("trainable_token_indices"), base)
    if base.is_tied and wanted.get(HEAD_MODULE) == wanted.get(EMBEDDING_MODULE):
        # PEFT ties equal rows, and saves them once.
        wanted.pop(HEAD_MODULE, None)
    found: dict[str, TokenRows] = {}
    for module, ids in wanted.items():
        names = [f"{PREFIX}{module}.{suffix}" for suffix in _ROW_SUFFIXES]
        name = next((name for name in names if name in shapes), None)
        if name is None:
            raise AdapterInvalidError("trainable_token_indices", f"its rows, {names[0]}, are missing")
        _check_shape(name, shapes[name], (len(ids), base.hidden_size))
        found[module] = TokenRows(name, ids)
    return found


def _parse_indices(value: Any, base: BaseDescription) -> dict[str, tuple[int, ...]]:
    """Module path → token ids; a bare list is the embedding's."""
    if not value:
        return {}
    by_name = value if isinstance(value, dict) else {"embed_tokens": value}
    parsed: dict[str, tuple[int, ...]] = {}
    for name, ids in by_name.items():
        if name not in _MODULES:
            raise AdapterUnsupportedError(
                "trainable_token_indices", f"'{shown(name)}' is neither embed_tokens nor lm_head"
            )
        if _MODULES[name] in parsed:
            raise AdapterInvalidError("trainable_token_indices", f"names {_MODULES[name]} twice")
        parsed[_MODULES[name]] = _parse_ids(ids, base)
    return parsed


def _parse_ids(ids: Any, base: BaseDescription) -> tuple[int, ...]:
    if not isinstance(ids, list | tuple) or not ids:
        raise AdapterInvalidError("trainable_token_indices", "must be a list of token ids")
    for token in ids:
        if type(token) is not int or not 0 <= token < base.vocab_size:
            raise AdapterInvalidError(
                "trainable_token_indices",
                f"{shown(str(token))} is not a token of the base, which has {base.vocab_size}",
            )
    if len(set(ids)) != len(ids):
        raise AdapterInvalidError("trainable_token_indices", "lists a token twice")
    return tuple(ids)


def _check_shape(name: str, shape: Shape, expected: Shape) -> None:
    if shape != expected:
        raise AdapterInvalidError(name, f"has shape {list(shape)}; expected {list(expected)}")
