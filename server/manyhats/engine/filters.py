"""Which tokens of one row may be drawn: top_k, top_p, min_p and typical_p, one after another.

Each filter sees the distribution that the ones before it have left, renormalized. All sums are over one row's
own numbers in an order that depends on nothing else, so a row comes out alike in any batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from manyhats.engine.request import SamplingParams

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

_WIDTHS = (np.float32(4.0), np.float32(8.0), np.float32(np.inf))
"""In nats from the first token in order: what is kept mostly lies within little, so little is sorted."""


def filtered(scaled: Floats, params: SamplingParams) -> tuple[Ids | None, Floats]:
    """The tokens that pass, ascending, and their weights; None stands for all tokens.

    Args:
        scaled: [V], (logits - max) / temperature, so that the largest is 0.
        params: its top_k, top_p, min_p and typical_p.

    Returns:
        ids, and exp(scaled) of them: probabilities up to a common factor. At least one token passes.
    """
    ids: Ids | None = None
    if 0 < params.top_k < scaled.size:
        ids = top_k_ids(scaled, params.top_k)
    x = scaled if ids is None else scaled[ids]
    weights = np.exp(x)
    if params.top_p < 1.0:
        ids, x, weights = _take(smallest_set(-x, weights, params.top_p), ids, x, weights)
    if params.min_p > 0.0:
        ids, x, weights = _take(np.flatnonzero(weights >= np.float32(params.min_p)), ids, x, weights)
    if params.typical_p < 1.0:
        ids, x, weights = _take(np.flatnonzero(weights), ids, x, weights)
        surprise = _surprise_deviation(x, weights)
        ids, x, weights = _take(smallest_set(surprise, weights, params.typical_p), ids, x, weights)
    return ids, weights


def top_k_ids(x: Floats, k: int) -> Ids:
    """The k largest, ascending by id; all that tie with the k-th stay, as in transformers."""
    kth = np.partition(x, x.size - k)[x.size - k]
    return np.flatnonzero(x >= kth)


def smallest_set(key: Floats, weights: Floats, mass: float) -> Ids:
    """The shortest run in order of (key, index) that holds at least ``mass`` of all weight; ascending.

    Args:
        key: [n] float32, at least 0; infinity is allowed.
        weights: [n] float32, at least 0.
        mass: in (0, 1].
    """
    needed = mass * float(weights.sum(dtype=np.float64))
    for width in _WIDTHS:
        ids: Ids = np.flatnonzero(key <= key.min() + width)
        if weights[ids].sum(dtype=np.float64) >= needed:
            break
    order = _stable_order(key[ids], ids)
    held = np.cumsum(weights[order], dtype=np.float64)
    return np.sort(order[: int(np.searchsorted(held, needed)) + 1])


def _stable_order(key: Floats, ids: Ids) -> Ids:
    """``ids`` in order of (key, id).

    Floats that are not negative order as their bits do, so key and id are packed into one integer each, which
    NumPy sorts many times faster than it sorts floats stably. Adding 0 makes -0 to 0.
    """
    packed = (key + np.float32(0)).view(np.uint32).astype(np.uint64) << np.uint64(32)
    packed |= ids.astype(np.uint64)
    packed.sort()
    order: Ids = (packed & np.uint64(0xFFFFFFFF)).astype(np.intp)
    return order


def _surprise_deviation(x: Floats, weights: Floats) -> Floats:
    """|-log p - H| of each token, H the entropy (Meister et al. 2022, arXiv:2202.00666, equation 9)."""
    total = weights.sum(dtype=np.float64)
    surprise = np.log(total) - x.astype(np.float64)
    entropy = (weights * surprise).sum() / total
    deviation: Floats = np.abs(surprise - entropy).astype(np.float32)
    return deviation


def _take(chosen: Ids, ids: Ids | None, x: Floats, weights: Floats) -> tuple[Ids, Floats, Floats]:
    return (chosen if ids is None else ids[chosen]), x[chosen], weights[chosen]
