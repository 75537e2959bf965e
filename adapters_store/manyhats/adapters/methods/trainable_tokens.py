"""Trainable tokens: rows of the embedding, and of the head, for a few tokens, as PEFT saves them by themselves.

``E[id] = row`` for each token that is listed, and the same for the head's rows; nothing else is trained. The file
holds the rows themselves, not differences. Where the base's head is its embedding, rows of the embedding act on both,
and PEFT saves them twice.

Source: PEFT's ``TrainableTokensConfig``; beside LoRA, ``trainable_token_indices`` is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError
from manyhats.adapters.formats.peft.fields import check_fields
from manyhats.adapters.formats.peft.module_selection import (
    EXCLUDED,
    LAYERS,
    LAYERS_PATTERN,
    TARGETS,
    check_selected,
)
from manyhats.adapters.formats.peft.saved_modules import (
    SavedModules,
    TokenRows,
    find_saved_modules,
    parse_token_ids,
)
from manyhats.adapters.formats.peft.tensors import (
    PREFIX,
    Misfit,
    ModuleTensors,
    candidate_of,
    find_misfit,
    group_tensors,
    raise_misfits,
    unusable,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate, OnAnyBase
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import EMBEDDING, HEAD, BaseDescription, Site

_ROWS = "trainable_tokens_delta"
_IDS = "token_indices"
_FIELDS = frozenset((_IDS, "init_weights"))
# Fields that PEFT's config of this method does not have.
_UNREAD = (EXCLUDED, LAYERS, LAYERS_PATTERN)


@dataclass(frozen=True, slots=True)
class TrainableTokensMethod(OnAnyBase):
    """Token rows from a PEFT directory."""

    @property
    def method(self) -> AdapterMethod:
        """TRAINABLE_TOKENS."""
        return AdapterMethod.TRAINABLE_TOKENS

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: every tensor must be used, and fit."""
        _place(candidate, base)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """``EmbeddingRows``, ``HeadRows``, or both."""
        saved = _place(candidate_of(artifact), base)
        return LoweredAdapter(artifact.digest, saved.lower(artifact.tensors, base))


def _place(candidate: Candidate, base: BaseDescription) -> SavedModules:
    """The rows, and weights that are saved alongside."""
    config, shapes = candidate.config, candidate.shapes
    check_fields(config, _FIELDS)
    ids = parse_token_ids(_IDS, config.get(_IDS), base)
    modules = group_tensors({name: shape for name, shape in shapes.items() if _ROWS in name}, (_ROWS,))
    if not modules:
        raise AdapterInvalidError(_IDS, f"its rows, {PREFIX}{base.path_of(EMBEDDING)}.{_ROWS}, are missing")
    sites = _sites_of_ends(base)
    misfits = [misfit for each in modules if (misfit := _find_misfit(each, len(ids), sites, base))]
    raise_misfits(misfits, modules, base, candidate.base_model)
    found = {sites[base.module_of(each.module) or ""]: each for each in modules}
    _check_selected(config, found, base)
    rows = {site: TokenRows(each.name(_ROWS), ids) for site, each in found.items()}
    saved = find_saved_modules(config, shapes, base, own_rows=rows)
    for site, name in saved.copies.items():
        if site not in rows:
            raise unusable(name)
    for name in saved.others(shapes):
        raise unusable(name)
    if base.is_tied and len(rows) == 2:
        return replace(saved, equal=(*saved.equal, (rows[EMBEDDING].tensor, rows[HEAD].tensor)))
    return saved


def _sites_of_ends(base: BaseDescription) -> dict[str, Site]:
    """Path → embedding or head."""
    paths = {base.path_of(site): site for site in (EMBEDDING, HEAD)}
    return {path: site for path, site in paths.items() if path}


def _find_misfit(
    tensors: ModuleTensors, num_rows: int, sites: Mapping[str, Site], base: BaseDescription
) -> Misfit | None:
    path = base.module_of(tensors.module)
    if path is None or path not in sites:
        return Misfit(tensors.any_name, "holds rows of a module that is neither the embedding nor the head")
    return find_misfit(tensors, _ROWS, (num_rows, base.embedding_size))


def _check_selected(
    config: Mapping[str, Any], found: Mapping[Site, ModuleTensors], base: BaseDescription
) -> None:
    """Without targets, PEFT takes the embedding; a tied head comes along with it."""
    if config.get(TARGETS) is None:
        config = {**config, TARGETS: [base.path_of(EMBEDDING)]}
    is_along = base.is_tied and EMBEDDING in found
    chosen = [tensors for site, tensors in found.items() if not (is_along and site == HEAD)]
    check_selected(config, chosen, base, unread=_UNREAD)
