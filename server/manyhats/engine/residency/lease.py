"""Adapters in memory, and requests' holds on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from manyhats.engine.residency.tiers import PlacedAdapter
from manyhats.engine.scheduling.sequence import Placement
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens


@dataclass(slots=True, eq=False)
class ResidentAdapter:
    """An adapter in the host's memory, or on its way there.

    Attributes:
        loaded: done when it is there, or has failed to be.
        is_loaded: whether requests can be queued on it.
        placement: of its sequences; None where they run on slot 0, as those of virtual tokens alone do: their rows are
            the base's, and cost what those cost.
        virtual: what its sequences begin with.
        num_bytes: of its numbers and virtual tokens.
        pins: how many leases there are, by version's name.
        is_forgotten: it goes with its last lease.
    """

    loaded: Future[None] = field(default_factory=Future)
    is_loaded: bool = False
    placement: PlacedAdapter | None = None
    virtual: VirtualTokens | None = None
    num_bytes: int = 0
    pins: Counter[str] = field(default_factory=Counter)
    is_forgotten: bool = False


_NO_ADAPTER: Final = ResidentAdapter()


@dataclass(slots=True, eq=False)
class Lease:
    """A request's hold on one version of an adapter, which stays in memory until ``release``; or on the base alone.

    It holds no slot: each of the request's sequences gets one while it runs, from ``placement``.

    Attributes:
        adapter: what it holds; may not be loaded yet.
        on_release: gives it back.
        load_s: how long the request waited for it.
        has_waited: whether it did.
    """

    adapter: ResidentAdapter = field(default=_NO_ADAPTER)
    on_release: Callable[[], None] | None = None
    load_s: float = 0.0
    has_waited: bool = False

    @property
    def placement(self) -> Placement | None:
        """Gives the request's sequences their slot; None where they run on slot 0."""
        return self.adapter.placement

    @property
    def virtual(self) -> VirtualTokens | None:
        """What the request's sequences begin with."""
        return self.adapter.virtual

    @property
    def num_virtual_tokens(self) -> int:
        """P, 0 where there are none."""
        return 0 if self.virtual is None else self.virtual.num_tokens

    def release(self) -> None:
        """Gives it back, once no unfinished sequence needs it. Safe to repeat."""
        on_release, self.on_release = self.on_release, None
        if on_release is not None:
            on_release()
