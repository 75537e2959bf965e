"""What PEFT trains besides a method: whole embeddings and heads, and single token rows.

``modules_to_save`` names modules that are trained as a whole. ``trainable_token_indices`` trains single rows of the
embedding, or of the head; the file holds the rows themselves, not differences.

If the base's head is its embedding, PEFT keeps one of the two unchanged, unless told otherwise:

- a module of ``modules_to_save`` is a copy of its own; with ``ensure_weight_tying`` both get it, where PEFT knows them;
- a weight that is saved without being named there replaces the base's, and so acts on both, or on the other of the two;
- token rows of the embedding act on both, unless the config gives the head other rows.

An embedding or head that a method adapts is saved alongside, unchanged, and PEFT loads it over the base's own: so it
must hold the base's values.

Where the vocabulary was resized, PEFT saves embedding and head whole, those beneath token rows too, and a module of
``modules_to_save`` three times. Their number of rows is then the task's vocabulary: fewer than the base's, which may be
padded, or more. Embedding and head must agree, or tokens would have one of the two only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError, BaseMismatchError, shown
from manyhats.adapters.formats.peft.module_selection import ends_of, is_tying_ensured
from manyhats.adapters.formats.peft.tensors import (
    PREFIX,
    Shape,
    unusable,
)
from manyhats.adapters.limits import MAX_ADDED_TOKENS
from manyhats.adapters.primitives import Delta, EmbeddingRows, HeadRows, HeadWeight
from manyhats.adapters.sites import EMBEDDING, HEAD, BaseDescription, Site

SAVED_FIELDS = frozenset(("modules_to_save", "trainable_token_indices", "ensure_weight_tying"))
"""Config fields that this file reads."""

# Relative, for values that were rounded to bfloat16 on one side only.
_BF16_ROUNDING = 2.0**-7
_COPY_SUFFIXES = ("base_layer.weight", "token_adapter.base_layer.weight")
# A trained module once more, which must be equal, and what it was before, which is not used.
_TRAINED, _ORIGINAL = "modules_to_save", "original_module"
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
        bias_copy: the same of the head's own bias; None if there is none.
        resized: embedding or head → name of the weight beneath its trained rows, where it is not the base's size.
        names: all these tensors.
        equal: pairs of names of one weight that is saved twice.
    """

    embedding: str | None
    head: str | None
    head_bias: str | None
    embedding_rows: TokenRows | None
    head_rows: TokenRows | None
    copies: Mapping[Site, str]
    resized: Mapping[Site, str]
    names: frozenset[str]
    equal: tuple[tuple[str, str], ...] = ()
    bias_copy: str | None = None

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
        rows = {EMBEDDING: self.embedding_rows, HEAD: self.head_rows}
        for site, name in self.copies.items():
            if base.path_of(site) not in adapted and rows[site] is None:
                raise unusable(name)

    def lower(self, tensors: Mapping[str, Tensor], base: BaseDescription) -> tuple[Delta, ...]:
        """The rows and weights as primitives; a whole embedding is all of its rows.

        Raises:
            AdapterInvalidError: a weight that is one for embedding and head was saved with two values.
            BaseMismatchError: a weight that was saved alongside is not the base's.
        """
        self._check_copies(tensors, base)
        for first, second in self.equal:
            if not torch.equal(tensors[first], tensors[second]):
                raise AdapterInvalidError(second, f"differs from {first}, to which it is tied")
        deltas: list[Delta] = []
        if (weight := self._whole(EMBEDDING, self.embedding, self.embedding_rows, tensors)) is not None:
            deltas.append(EmbeddingRows(torch.arange(weight.shape[0]), weight))
        elif (rows := self.embedding_rows) is not None:
            deltas.append(EmbeddingRows(torch.tensor(rows.ids), tensors[rows.tensor]))
        if (weight := self._whole(HEAD, self.head, self.head_rows, tensors)) is not None:
            bias = None if self.head_bias is None else tensors[self.head_bias]
            deltas.append(HeadWeight(weight, bias))
        elif (rows := self.head_rows) is not None:
            deltas.append(HeadRows(torch.tensor(rows.ids), tensors[rows.tensor]))
        return tuple(deltas)

    def _whole(
        self, site: Site, whole: str | None, rows: TokenRows | None, tensors: Mapping[str, Tensor]
    ) -> Tensor | None:
        """The weight that replaces the base's; None if none does."""
        if whole is not None or rows is None or site not in self.resized:
            return None if whole is None else tensors[whole]
        beneath, own = tensors[self.resized[site]], tensors[rows.tensor]
        weight = beneath.to(torch.promote_types(beneath.dtype, own.dtype), copy=True)
        weight[list(rows.ids)] = own.to(weight.dtype)
        return weight

    def _check_copies(self, tensors: Mapping[str, Tensor], base: BaseDescription) -> None:
        """Compare values where the base's are available."""
        for site, name in self.copies.items():
            if base.weights is None:
                continue
            weight, bias = base.weights.linear(site)
            _check_copy(name, tensors[name], weight)
            if site == HEAD and self.bias_copy is not None and bias is not None:
                _check_copy(self.bias_copy, tensors[self.bias_copy], bias)


def _check_copy(name: str, copy: Tensor, own: Tensor) -> None:
    if not torch.allclose(copy.float(), own, rtol=_BF16_ROUNDING, atol=1e-6):
        raise BaseMismatchError(name, "was saved alongside, and its values differ from the base's")


def find_saved_modules(
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    base: BaseDescription,
    *,
    own_rows: Mapping[Site, TokenRows] | None = None,
) -> SavedModules:
    """Find and check what the file holds besides its method's own tensors.

    Args:
        config: the parsed ``adapter_config.json``.
        shapes: tensor name → shape.
        base: the resident one.
        own_rows: the token rows of a method that trains nothing else; None to find those beside another one.

    Raises:
        AdapterUnsupportedError: a module that is neither embedding nor head, or rows of a head that has a bias.
        AdapterInvalidError: a tensor is missing, or has another shape than the base's.
    """
    listed = _listed_modules(config, base)
    paths = _paths_in_file(shapes, base)
    present = {site: f"{path}.weight" for site, path in paths.items() if f"{path}.weight" in shapes}
    for site in listed:
        if site not in present:
            raise AdapterInvalidError(
                "modules_to_save", f"names {base.path_of(site)}, but {paths[site]}.weight is missing"
            )
    rows = _find_rows(config, paths, shapes, base) if own_rows is None else own_rows
    copies = _named(paths, _COPY_SUFFIXES, shapes)
    for name in (*present.values(), *copies.values()):
        _check_width(name, shapes[name], base)
    head_bias = _find_head_bias(paths.get(HEAD, ""), present, shapes, base)
    bias_copy = _find_bias_copy(copies, shapes, base)
    again = _find_again(paths, present, head_bias, shapes)
    for site, found in rows.items():
        for other in (EMBEDDING, HEAD) if base.is_tied else (site,):
            if other in present:
                raise AdapterInvalidError(found.tensor, f"and {present[other]} both replace the same rows")
    is_one = base.is_tied and bool(present) and (is_tying_ensured(config, base) or not listed)
    first = next(iter(present.values()), None)
    equal = [pair for pair in again if f".{_TRAINED}." in pair[1]]
    equal += [(present[EMBEDDING], present[HEAD])] if is_one and len(present) == 2 else []
    embedding_rows, head_rows = rows.get(EMBEDDING), rows.get(HEAD)
    if base.is_tied and embedding_rows is not None and head_rows is None and HEAD not in present:
        head_rows = embedding_rows
        tied = _rows_names(paths[HEAD])
        equal += [(embedding_rows.tensor, name) for name in tied if name in shapes]
    if head_rows is not None and base.has_head_bias:
        raise AdapterUnsupportedError(
            head_rows.tensor, "holds rows of a head that has a bias, which PEFT leaves out there"
        )
    resized = {site: name for site, name in copies.items() if shapes[name][0] != base.vocab_size}
    if base.is_tied and EMBEDDING in resized and head_rows is embedding_rows:
        equal += [(resized[EMBEDDING], resized[HEAD])] if HEAD in resized else []
        resized[HEAD] = resized[EMBEDDING]
    tensors = (
        *present.values(),
        *copies.values(),
        *(found.tensor for found in rows.values()),
        *(name for pair in (*again, *equal) for name in pair),
    )
    saved = SavedModules(
        embedding=first if is_one else present.get(EMBEDDING),
        head=first if is_one else present.get(HEAD),
        head_bias=head_bias,
        embedding_rows=embedding_rows,
        head_rows=head_rows,
        copies={site: name for site, name in copies.items() if shapes[name][0] == base.vocab_size},
        resized=resized,
        names=frozenset((*tensors, *(name for name in (head_bias, bias_copy) if name is not None))),
        equal=tuple(equal),
        bias_copy=bias_copy,
    )
    _check_sizes(saved, shapes, base)
    return saved


def _find_again(
    paths: Mapping[Site, str], trained: Mapping[Site, str], head_bias: str | None, shapes: Mapping[str, Shape]
) -> list[tuple[str, str]]:
    """Names of trained modules' tensors, each with another that holds the same, or what that was before."""
    names = [(paths[site], name) for site, name in trained.items()]
    if head_bias is not None:
        names.append((paths[HEAD], head_bias))
    found = [
        (name, f"{path}.{kind}.{name.rpartition('.')[2]}")
        for kind in (_TRAINED, _ORIGINAL)
        for path, name in names
    ]
    again = [(name, other) for name, other in found if other in shapes]
    for name, other in again:
        _check_shape(other, shapes[other], shapes[name])
    return again


def _named(
    paths: Mapping[Site, str], suffixes: Collection[str], shapes: Mapping[str, Shape]
) -> dict[Site, str]:
    """Embedding or head → its tensor with one of these suffixes."""
    names = {site: [f"{path}.{suffix}" for suffix in suffixes] for site, path in paths.items()}
    found = {site: [name for name in each if name in shapes] for site, each in names.items()}
    return {site: each[0] for site, each in found.items() if each}


def _check_sizes(saved: SavedModules, shapes: Mapping[str, Shape], base: BaseDescription) -> None:
    """Check that each token of the task has a row in both embedding and head, if it has a vocabulary of its own."""
    embedding = _Table.of(EMBEDDING, saved.embedding, saved.embedding_rows, saved, shapes, base)
    head = _Table.of(HEAD, saved.head, saved.head_rows, saved, shapes, base)
    for table, other in ((embedding, head), (head, embedding)):
        name = table.tensor
        if name is None or table.num_rows == other.num_rows or not base.path_of(HEAD):
            continue
        if table is head and head.num_rows < base.vocab_size and not embedding.is_whole:
            continue  # the base's embedding has rows for all of them
        raise AdapterInvalidError(
            name,
            f"makes a vocabulary of {table.num_rows} tokens, and {other.name} has {other.num_rows} rows; with tokens "
            "of its own an adapter must hold both embedding and head, as with modules_to_save or "
            "save_embedding_layers",
        )
    for site in saved.resized:
        table = embedding if site == EMBEDDING else head
        if not table.is_whole:
            raise AdapterUnsupportedError(
                saved.resized[site],
                f"has {shapes[saved.resized[site]][0]} rows, the base's {base.vocab_size}; a resized embedding or "
                "head is served if it is replaced whole or by rows, not where the method adapts it",
            )


@dataclass(frozen=True, slots=True)
class _Table:
    """The embedding or the head as the file changes it: its path, its rows, the tensor that says so, if any."""

    name: str
    num_rows: int
    tensor: str | None
    is_whole: bool

    @classmethod
    def of(
        cls,
        site: Site,
        whole: str | None,
        rows: TokenRows | None,
        saved: SavedModules,
        shapes: Mapping[str, Shape],
        base: BaseDescription,
    ) -> _Table:
        path = base.path_of(site)
        if whole is None and rows is not None:
            whole = saved.resized.get(site)
        num_rows = base.vocab_size if whole is None else shapes[whole][0]
        if rows is not None and whole is None:
            added = sorted(token for token in rows.ids if token >= num_rows)
            if added != list(range(num_rows, num_rows + len(added))):
                raise AdapterInvalidError(
                    rows.tensor,
                    f"has rows for tokens up to {added[-1]}, but not for all that follow the base's {num_rows}",
                )
            return cls(path, num_rows + len(added), rows.tensor, False)
        if rows is not None and max(rows.ids) >= num_rows:
            raise AdapterInvalidError(
                rows.tensor, f"has a row for token {max(rows.ids)}; {whole} has {num_rows}"
            )
        return cls(path, num_rows, whole, whole is not None)


def _find_head_bias(
    path: str, present: Mapping[Site, str], shapes: Mapping[str, Shape], base: BaseDescription
) -> str | None:
    """The name of a whole head's bias; None if there is no such head, or the base's has no bias."""
    if HEAD not in present or not base.has_head_bias:
        return None
    name = f"{path}.bias"
    if name not in shapes:
        raise AdapterInvalidError(present[HEAD], f"its partner {name} is missing")
    _check_shape(name, shapes[name], shapes[present[HEAD]][:1])
    return name


def _find_bias_copy(
    copies: Mapping[Site, str], shapes: Mapping[str, Shape], base: BaseDescription
) -> str | None:
    """The name of an adapted head's own bias, saved alongside its weight."""
    if HEAD not in copies or not base.has_head_bias:
        return None
    name = copies[HEAD].removesuffix("weight") + "bias"
    if name not in shapes:
        return None
    _check_shape(name, shapes[name], (base.vocab_size,))
    return name


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
                f"'{shown(name)}' is trained as a whole; only {_ends_of(base)} can be here",
            )
    return frozenset(known[name] for name in names)


def _names_of_ends(base: BaseDescription) -> dict[str, Site]:
    """What a config may call embedding and head: their paths, or the ends of these."""
    return {
        name: site for site in (EMBEDDING, HEAD) for path in base.spellings(site) for name in ends_of(path)
    }


def _paths_in_file(shapes: Mapping[str, Shape], base: BaseDescription) -> dict[Site, str]:
    """What the tensors' names begin with, of the embedding and of the output head if there is one."""
    paths = {site: [f"{PREFIX}{path}" for path in base.spellings(site)] for site in (EMBEDDING, HEAD)}
    return {
        site: next((path for path in each if any(name.startswith(f"{path}.") for name in shapes)), each[0])
        for site, each in paths.items()
        if each
    }


def _ends_of(base: BaseDescription) -> str:
    """What the embedding is called, and the output head if there is one."""
    names = (base.path_of(site).rpartition(".")[2] for site in (EMBEDDING, HEAD))
    return " and ".join(name for name in names if name)


def _find_rows(
    config: Mapping[str, Any], paths: Mapping[Site, str], shapes: Mapping[str, Shape], base: BaseDescription
) -> dict[Site, TokenRows]:
    """Embedding or head → its trained rows, for each tensor that the config makes PEFT save."""
    wanted = _parse_indices(config.get("trainable_token_indices"), base)
    if base.is_tied and wanted.get(HEAD) == wanted.get(EMBEDDING):
        # PEFT ties equal rows, and saves them once.
        wanted.pop(HEAD, None)
    found: dict[Site, TokenRows] = {}
    for site, ids in wanted.items():
        names = _rows_names(paths[site])
        name = next((name for name in names if name in shapes), None)
        if name is None:
            raise AdapterInvalidError("trainable_token_indices", f"its rows, {names[0]}, are missing")
        _check_shape(name, shapes[name], (len(ids), base.embedding_size))
        found[site] = TokenRows(name, ids)
    return found


def _rows_names(path: str) -> list[str]:
    return [f"{path}.{suffix}" for suffix in _ROW_SUFFIXES]


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
                f"'{shown(name)}' has no rows of tokens; only {_ends_of(base)} can be here",
            )
        if known[name] in parsed:
            raise AdapterInvalidError("trainable_token_indices", f"names {base.path_of(known[name])} twice")
        parsed[known[name]] = parse_token_ids("trainable_token_indices", ids, base)
    return parsed


def parse_token_ids(field: str, ids: Any, base: BaseDescription) -> tuple[int, ...]:
    """A config's list of the tokens whose rows are trained.

    Raises:
        AdapterInvalidError: names the field.
    """
    if not isinstance(ids, list | tuple) or not ids:
        raise AdapterInvalidError(field, "must be a list of token ids")
    for token in ids:
        if type(token) is not int or not 0 <= token < base.vocab_size + MAX_ADDED_TOKENS:
            raise AdapterInvalidError(
                field,
                f"{shown(str(token))} is not a token of the base, which has {base.vocab_size}, nor one of "
                f"{MAX_ADDED_TOKENS} that may be added",
            )
    if len(set(ids)) != len(ids):
        raise AdapterInvalidError(field, "lists a token twice")
    return tuple(ids)


def _check_width(name: str, shape: Shape, base: BaseDescription) -> None:
    """Check a whole embedding or head, whose rows may be fewer than the base's, or more."""
    wanted = (base.vocab_size, base.embedding_size)
    if len(shape) != 2 or shape[1] != wanted[1]:
        raise AdapterInvalidError(name, f"has shape {list(shape)}; expected {list(wanted)}")
    if not 1 <= shape[0] <= base.vocab_size + MAX_ADDED_TOKENS:
        raise AdapterInvalidError(
            name,
            f"has {shape[0]} rows, the base's {base.vocab_size}; at most {MAX_ADDED_TOKENS} tokens may be added",
        )


def _check_shape(name: str, shape: Shape, expected: Shape) -> None:
    if shape != expected:
        raise AdapterInvalidError(name, f"has shape {list(shape)}; expected {list(expected)}")
