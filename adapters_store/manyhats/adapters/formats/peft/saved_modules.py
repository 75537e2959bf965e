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
    PREFIX,
    Shape,
    unusable,
)
from manyhats.adapters.primitives import Delta, EmbeddingRows, HeadRows, HeadWeight
from manyhats.adapters.sites import EMBEDDING, HEAD, BaseDescription, Site

SAVED_FIELDS = frozenset(("modules_to_save", "trainable_token_indices", "ensure_weight_tying"))
"""Config fields that this file reads."""

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
        head_bias: name of the tensor that replaces the head's bias, if it has one.
        embedding_rows, head_rows: the same for single rows.
        copies: embedding or head → name of an adapted module's own weight, saved alongside.
        names: all these tensors.
        equal: names of one weight saved twice.
    """

    embedding: str | None
    head: str | None
    head_bias: str | None
    embedding_rows: TokenRows | None
    head_rows: TokenRows | None
    copies: Mapping[Site, str]
    names: frozenset[str]
    equal: tuple[str, ...] = ()

    def others(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """All other tensors."""
        return {name: shape for name, shape in shapes.items() if name not in self.names}

    def check_modules(self, modules: Collection[str], base: BaseDescription) -> None:
        """Check these tensors against the modules that the method adapts, by the paths in the file.

        Raises:
            AdapterInvalidError: a module is adapted and replaced as well, which PEFT itself does not allow.
            AdapterUnsupportedError: the weight of a module that is not adapted was saved as if it were.
        """
        adapted = {base.module_of(module) for module in modules}
        replaced = {EMBEDDING: self.embedding or self.embedding_rows, HEAD: self.head or self.head_rows}
        for site, by in replaced.items():
            path = base.path_of(site)
            if path in adapted and by is not None:
                raise AdapterInvalidError(path, "is adapted, and also replaced by trained rows or weights")
        for site, name in self.copies.items():
            if base.path_of(site) not in adapted:
                raise unusable(name)

    def lower(self, tensors: Mapping[str, Tensor], base: BaseDescription) -> tuple[Delta, ...]:
        """The rows and weights as primitives; a whole embedding is all of its rows.

        Raises:
            AdapterInvalidError: a weight that is one for embedding and head was saved with two values.
            BaseMismatchError: a weight that was saved alongside is not the base's.
        """
        self._check_copies(tensors, base)
        if self.equal and not torch.equal(*(tensors[name] for name in self.equal)):
            raise AdapterInvalidError(self.equal[1], "differs from the embedding that it is tied to")
        deltas: list[Delta] = []
        if self.embedding is not None:
            weight = tensors[self.embedding]
            deltas.append(EmbeddingRows(torch.arange(weight.shape[0]), weight))
        if self.embedding_rows is not None:
            rows = self.embedding_rows
            deltas.append(EmbeddingRows(torch.tensor(rows.ids), tensors[rows.tensor]))
        if self.head is not None:
            bias = None if self.head_bias is None else tensors[self.head_bias]
            deltas.append(HeadWeight(tensors[self.head], bias))
        if self.head_rows is not None:
            ids = torch.tensor(self.head_rows.ids)
            own = base.weights.linear(HEAD)[1] if base.has_head_bias and base.weights is not None else None
            bias = None if own is None else own[ids]
            deltas.append(HeadRows(ids, tensors[self.head_rows.tensor], bias))
        return tuple(deltas)

    def _check_copies(self, tensors: Mapping[str, Tensor], base: BaseDescription) -> None:
        """Compare values where the base's are available: those of the head, and so of a tied embedding."""
        for site, name in self.copies.items():
            if base.weights is None or not (base.is_tied or site == HEAD):
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
    listed = _listed_modules(config, base)
    paths = {site: f"{PREFIX}{path}" for site, path in _paths_of_ends(base).items()}
    present = {site: f"{path}.weight" for site, path in paths.items() if f"{path}.weight" in shapes}
    for site in listed:
        if site not in present:
            raise AdapterInvalidError(
                "modules_to_save", f"names {base.path_of(site)}, but {paths[site]}.weight is missing"
            )
    copies = {site: f"{path}.base_layer.weight" for site, path in paths.items()}
    copies = {site: name for site, name in copies.items() if name in shapes}
    for name in (*present.values(), *copies.values()):
        _check_shape(name, shapes[name], (base.vocab_size, base.embedding_size))
    head_bias = _find_head_bias(paths.get(HEAD, ""), present, shapes, base)
    rows = _find_rows(config, shapes, base)
    for site, found in rows.items():
        for other in (EMBEDDING, HEAD) if base.is_tied else (site,):
            if other in present:
                raise AdapterInvalidError(found.tensor, f"and {present[other]} both replace the same rows")
    is_one = base.is_tied and _acts_on_both(config, present, listed)
    first = next(iter(present.values()), None)
    embedding_rows, head_rows = rows.get(EMBEDDING), rows.get(HEAD)
    if base.is_tied and head_rows is None and HEAD not in present:
        head_rows = embedding_rows
    tensors = (*present.values(), *copies.values(), *(found.tensor for found in rows.values()))
    return SavedModules(
        embedding=first if is_one else present.get(EMBEDDING),
        head=first if is_one else present.get(HEAD),
        head_bias=head_bias,
        embedding_rows=embedding_rows,
        head_rows=head_rows,
        copies=copies,
        names=frozenset((*tensors, *(() if head_bias is None else (head_bias,)))),
        equal=tuple(present.values()) if is_one and len(present) == 2 else (),
    )


def _find_head_bias(
    path: str, present: Mapping[Site, str], shapes: Mapping[str, Shape], base: BaseDescription
) -> str | None:
    """The name of a whole head's bias; None if there is no such head, or the base's has no bias."""
    if HEAD not in present or not base.has_head_bias:
        return None
    name = f"{path}.bias"
    if name not in shapes:
        raise AdapterInvalidError(present[HEAD], f"its partner {name} is missing")
    _check_shape(name, shapes[name], (base.vocab_size,))
    return name


def _acts_on_both(config: Mapping[str, Any], present: Collection[Site], listed: Collection[Site]) -> bool:
    """Whether a tied base's embedding and head stay one weight."""
    is_ensured = parse_flag("ensure_weight_tying", config.get("ensure_weight_tying"))
    return bool(present) and (is_ensured or not set(present) <= set(listed))


def _listed_modules(config: Mapping[str, Any], base: BaseDescription) -> frozenset[Site]:
    """``modules_to_save``, as sites."""
    names = config.get("modules_to_save") or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise AdapterInvalidError("modules_to_save", "must be a list of module names")
    known = _names_of_ends(base)
    for name in names:
        if name not in known:
            raise AdapterUnsupportedError(
                "modules_to_save",
                f"'{shown(name)}' is trained as a whole; only {_last_name(HEAD, base)} and "
                f"{_last_name(EMBEDDING, base)} are served",
            )
    return frozenset(known[name] for name in names)


def _names_of_ends(base: BaseDescription) -> dict[str, Site]:
    """What a config may call embedding and head: their paths, or the last part of these."""
    return {
        name: site for site, path in _paths_of_ends(base).items() for name in (path, _last_name(site, base))
    }


def _paths_of_ends(base: BaseDescription) -> dict[Site, str]:
    """Paths of the embedding, and of the output head if there is one."""
    paths = {site: base.path_of(site) for site in (EMBEDDING, HEAD)}
    return {site: path for site, path in paths.items() if path}


def _last_name(site: Site, base: BaseDescription) -> str:
    return base.path_of(site).rpartition(".")[2]


def _find_rows(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], base: BaseDescription
) -> dict[Site, TokenRows]:
    """Embedding or head → its trained rows, for each tensor that the config makes PEFT save."""
    wanted = _parse_indices(config.get("trainable_token_indices"), base)
    if base.is_tied and wanted.get(HEAD) == wanted.get(EMBEDDING):
        # PEFT ties equal rows, and saves them once.
        wanted.pop(HEAD, None)
    found: dict[Site, TokenRows] = {}
    for site, ids in wanted.items():
        names = [f"{PREFIX}{base.path_of(site)}.{suffix}" for suffix in _ROW_SUFFIXES]
        name = next((name for name in names if name in shapes), None)
        if name is None:
            raise AdapterInvalidError("trainable_token_indices", f"its rows, {names[0]}, are missing")
        _check_shape(name, shapes[name], (len(ids), base.embedding_size))
        found[site] = TokenRows(name, ids)
    return found


def _parse_indices(value: Any, base: BaseDescription) -> dict[Site, tuple[int, ...]]:
    """Embedding or head → token ids; a bare list is the embedding's."""
    if not value:
        return {}
    by_name = value if isinstance(value, dict) else {base.path_of(EMBEDDING): value}
    known = _names_of_ends(base)
    parsed: dict[Site, tuple[int, ...]] = {}
    for name, ids in by_name.items():
        if name not in known:
            raise AdapterUnsupportedError(
                "trainable_token_indices",
                f"'{shown(name)}' is neither {_last_name(EMBEDDING, base)} nor {_last_name(HEAD, base)}",
            )
        if known[name] in parsed:
            raise AdapterInvalidError("trainable_token_indices", f"names {base.path_of(known[name])} twice")
        parsed[known[name]] = _parse_ids(ids, base)
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
