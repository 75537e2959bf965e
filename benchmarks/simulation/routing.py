"""How requests are spread over replicas: what a proxy or a gateway in front of them does."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from hashlib import blake2b

from benchmarks.simulation.replica import Replica

Route = Callable[[str], Replica]
"""The replica that a request of a task goes to."""

_BALANCE = 1.5
"""A replica with this many times the average's unfinished requests gets no more of its own. Envoy's
``hash_balance_factor`` of 150."""
_SCRAPE_S = 0.2


def at_random(replicas: Sequence[Replica], clock: Callable[[], float]) -> Route:
    """Any of them, as a balancer does that does not know of tasks."""
    rng = random.Random(0)
    return lambda task: rng.choice(replicas)


def by_hash(replicas: Sequence[Replica], clock: Callable[[], float]) -> Route:
    """The first in the task's own order of replicas that is not far above the average, as Envoy does by a header.

    Source: Mirrokni, Thorup and Zadimoghaddam 2018, Consistent Hashing with Bounded Loads.
    """
    orders: dict[str, list[Replica]] = {}

    def route(task: str) -> Replica:
        order = orders.get(task)
        if order is None:
            seed = int.from_bytes(blake2b(task.encode(), digest_size=8).digest(), "big")
            order = orders[task] = random.Random(seed).sample(replicas, len(replicas))
        return _first_below(order, replicas)

    return route


def by_adapters(replicas: Sequence[Replica], clock: Callable[[], float]) -> Route:
    """Of those that had the adapter in memory at the last scrape the one with the fewest requests, as a gateway does.

    Where that is far above the average, or none has it, the one with the fewest of all.
    """
    holders: dict[str, list[Replica]] = {}
    scraped_s = -_SCRAPE_S

    def route(task: str) -> Replica:
        nonlocal scraped_s
        if clock() - scraped_s >= _SCRAPE_S:
            scraped_s = clock()
            holders.clear()
            for replica in replicas:
                for digest in replica.residency.tiers():
                    holders.setdefault(digest, []).append(replica)
        order = sorted(holders.get(replicas[0].records[task].digest, ()), key=_num_unfinished)
        return _first_below([*order, min(replicas, key=_num_unfinished)], replicas)

    return route


def _first_below(order: Sequence[Replica], replicas: Sequence[Replica]) -> Replica:
    most = math.ceil(_BALANCE * (1 + sum(map(_num_unfinished, replicas))) / len(replicas))
    return next((replica for replica in order if replica.num_unfinished < most), order[-1])


def _num_unfinished(replica: Replica) -> int:
    return replica.num_unfinished
