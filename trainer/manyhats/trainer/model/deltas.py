"""An adapter's primitives by the site where they act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    Delta,
    InputScale,
    LoweredAdapter,
    by_site,
)
from manyhats.adapters.sites import HEAD, Site
from manyhats.engine.model.architecture import SUBLAYERS
from manyhats.trainer.errors import BaseError

DeltaT = TypeVar("DeltaT")


@dataclass(frozen=True, slots=True, eq=False)
class PlacedDeltas:
    """All deltas of one adapter; those of a site keep their order."""

    by_site: Mapping[Site, Sequence[Delta]]

    def at(self, site: Site, kind: type[DeltaT]) -> list[DeltaT]:
        """The deltas of one kind at a site."""
        return [delta for delta in self.by_site.get(site, ()) if isinstance(delta, kind)]


def place_deltas(adapter: LoweredAdapter | None, sites: Set[Site]) -> PlacedDeltas:
    """Sort an adapter's deltas by site.

    Args:
        adapter: None for none.
        sites: the decoder's.

    Raises:
        BaseError: one acts at a site that this decoder does not have.
    """
    placed = PlacedDeltas(by_site(() if adapter is None else adapter.deltas))
    for site, deltas in placed.by_site.items():
        if site not in sites:
            raise BaseError(f"{site}: the base has no such place")
        for delta in deltas:
            _check_kind(site, delta)
    return placed


def _check_kind(site: Site, delta: Delta) -> None:
    name = type(delta).__name__
    if isinstance(delta, Bottleneck) != (site.name in SUBLAYERS):
        raise BaseError(f"{site}: {name} does not act there")
    if getattr(delta, "gate", None) is not None:
        raise BaseError(f"{site}: gates are not trained")
    if site == HEAD and isinstance(delta, Affine | InputScale):
        raise BaseError(f"{site}: {name} is not trained on the output head")
