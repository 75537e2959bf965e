"""Adapters in memory, and requests' leases on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from manyhats.adapters.heads import TaskHead
from manyhats.engine.residency.tiers import PlacedAdapter
from manyhats.engine.scheduling.sequence import Placement
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens


@dataclass(slots=True, eq=False)
class ResidentAdapter:
    """An adapter in the host's memory, or on its way there.

    Attributes:
        loaded: done when it is loaded, or failed to load.
        is_loaded: whether requests can be queued on it.
        placement: of its sequences; None if they run on slot 0, as with virtual tokens only: their rows cost what the
            base's do.
        virtual: the virtual tokens its sequences begin with.
        head: of its task; None if that generates.
        vocab_size: the number of its task's tokens; None if they are the base's.
        num_bytes: of its packed matrices, virtual tokens and head.
        leases: how many there are, by version name.
        is_pinned: whether it stays when nobody holds it.
        is_forgotten: whether it is dropped with its last lease.
    """

    loaded: Future[None] = field(default_factory=Future)
    is_loaded: bool = False
    placement: PlacedAdapter | None = None
    virtual: VirtualTokens | None = None
    head: TaskHead | None = None
    vocab_size: int | None = None
    num_bytes: int = 0
    leases: Counter[str] = field(default_factory=Counter)
    is_pinned: bool = False
    is_forgotten: bool = False

    @property
    def is_evictable(self) -> bool:
        """Whether it may make room for another."""
        return not self.leases and not self.is_pinned


_NO_ADAPTER: Final = ResidentAdapter()


@dataclass(slots=True, eq=False)
class Lease:
    """A request's hold on one version of an adapter, which stays in memory until ``release``; or on only the base.

    It holds no slot: ``placement`` gives each of the request's sequences one while it runs.

    Attributes:
        adapter: the adapter held; it may not be loaded yet.
        on_release: returns the lease.
        load_s: how long the request waited for it.
        has_waited: whether it did.
    """

    adapter: ResidentAdapter = field(default=_NO_ADAPTER)
    on_release: Callable[[], None] | None = None
    load_s: float = 0.0
    has_waited: bool = False

    @property
    def placement(self) -> Placement | None:
        """Gives the request's sequences their slot; None if they run on slot 0."""
        return self.adapter.placement

    @property
    def virtual(self) -> VirtualTokens | None:
        """The virtual tokens the request's sequences begin with."""
        return self.adapter.virtual

    @property
    def head(self) -> TaskHead | None:
        """The head of the request's task; None if that generates."""
        return self.adapter.head

    @property
    def vocab_size(self) -> int | None:
        """The number of the task's tokens; None if they are the base's."""
        return self.adapter.vocab_size

    @property
    def num_virtual_tokens(self) -> int:
        """P, 0 if there are none."""
        return 0 if self.virtual is None else self.virtual.num_tokens

    def release(self) -> None:
        """Return the lease, once no unfinished sequence needs it. Safe to repeat."""
        on_release, self.on_release = self.on_release, None
        if on_release is not None:
            on_release()
