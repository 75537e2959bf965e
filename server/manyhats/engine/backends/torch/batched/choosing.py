"""How the tokens of all rows are chosen at once: in float64, with whole sorts. ``Choices`` says what is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.torch.upload import uploaded, uploaded_ints
from manyhats.engine.backends.wants import Choices

_LARGEST = 1e30


def chosen(logits: Tensor, choices: Choices) -> Tensor:
    """One token for each row of ``choices``: [S] int64; −1 where none is allowed.

    Args:
        logits: [M, V] float32.
        choices: on the host.
    """
    (rows,) = uploaded_ints([choices.rows], logits.device)
    picked = logits.index_select(0, rows)
    if not choices.edit_ids.size and not choices.masks.size and not (choices.temperature > 0).any():
        return picked.argmax(dim=1)
    values = edited(picked, choices)
    is_allowed = values.amax(dim=1) > -torch.inf
    tokens = values.argmax(dim=1)
    sampling = np.flatnonzero(choices.temperature > 0)
    if sampling.size:
        (places,) = uploaded_ints([sampling], logits.device)
        filters = Filters.of(choices, sampling, logits.device)
        tokens.index_copy_(0, places, sampled(values.index_select(0, places), filters))
    return torch.where(is_allowed, tokens, -1)


def edited(logits: Tensor, choices: Choices) -> Tensor:
    """[S, V] float64: logits after edits, each step of which is rounded to float32, and masks."""
    values = logits.double()
    device, vocab_size = logits.device, logits.shape[1]
    if choices.edit_ids.size:
        kept = _last_edits(choices)
        row_of = np.repeat(np.arange(choices.num_rows), np.diff(choices.edit_start))[kept]
        rows, ids, is_seen = uploaded_ints([row_of, choices.edit_ids[kept], choices.edit_seen[kept]], device)
        bias, counts, repetition, presence, frequency = _floats(
            [
                choices.edit_bias[kept],
                choices.edit_counts[kept],
                choices.repetition_penalty[row_of],
                choices.presence_penalty[row_of],
                choices.frequency_penalty[row_of],
            ],
            device,
        )
        value = logits[rows, ids] + bias.float()
        wide = torch.where(value > 0, value.double() / repetition, value.double() * repetition)
        repeated = wide.clamp(-_LARGEST, _LARGEST).float()
        value = torch.where((is_seen > 0) & (repetition != 1.0), repeated, value)
        penalty = presence * (counts > 0) + frequency * counts
        values.index_put_((rows, ids), (value - penalty.float()).double())
    if choices.masks.size:
        return values.masked_fill_(~_is_allowed(choices, vocab_size, device), -torch.inf)
    return values


def _last_edits(choices: Choices) -> np.ndarray:
    """The edits that count: of two for one token of a row, the later."""
    row_of = np.repeat(np.arange(choices.num_rows), np.diff(choices.edit_start))
    keys = np.stack((row_of, choices.edit_ids), axis=1)[::-1]
    _, places = np.unique(keys, axis=0, return_index=True)
    found: np.ndarray = len(keys) - 1 - places
    return found


def _is_allowed(choices: Choices, vocab_size: int, device: torch.device) -> Tensor:
    """[S, V] what the rows' masks let through."""
    (mask_rows,) = uploaded_ints([choices.mask_rows], device)
    words = uploaded(torch.from_numpy(choices.masks), device)
    bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=device)) & 1
    of_mask = bits.flatten(1)[:, :vocab_size].bool()
    return of_mask.index_select(0, mask_rows.clamp(min=0)) | (mask_rows < 0).unsqueeze(1)


@dataclass(frozen=True, slots=True, eq=False)
class Filters:
    """What S rows are sampled by: [S, 1] each on the device; None for what no row has."""

    temperature: Tensor
    point: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    typical_p: Tensor | None

    @classmethod
    def of(cls, choices: Choices, rows: np.ndarray, device: torch.device) -> Filters:
        """Those of some of the rows."""
        names = ("temperature", "point", "top_k", "top_p", "min_p", "typical_p")
        arrays = {name: getattr(choices, name)[rows] for name in names}
        tensors = dict(zip(names, _floats(list(arrays.values()), device), strict=True))
        is_used = {
            "top_k": arrays["top_k"] > 0,
            "top_p": arrays["top_p"] < 1,
            "min_p": arrays["min_p"] > 0,
            "typical_p": arrays["typical_p"] < 1,
        }
        return cls(
            temperature=tensors["temperature"].unsqueeze(1),
            point=tensors["point"].unsqueeze(1),
            **{name: tensors[name].unsqueeze(1) if used.any() else None for name, used in is_used.items()},
        )


def sampled(values: Tensor, filters: Filters) -> Tensor:
    """One token a row: the first that passes and whose cumulative probability exceeds the row's point.

    Args:
        values: [S, V] float64.
        filters: of the rows.
    """
    x = (values - values.amax(dim=1, keepdim=True)) / filters.temperature
    passes = passing(x, filters)
    cumulative = _softmax(x, passes).cumsum(dim=1)
    beyond = passes & (cumulative > filters.point)
    last = x.shape[1] - 1 - passes.flip(1).to(torch.uint8).argmax(dim=1)
    return torch.where(beyond.any(dim=1), beyond.to(torch.uint8).argmax(dim=1), last)


def passing(x: Tensor, filters: Filters) -> Tensor:
    """[S, V] which tokens pass the filters; x are logits up to a constant, −∞ where a token may not come."""
    passes = x > -torch.inf
    if filters.top_k is not None or filters.top_p is not None:
        passes = _of_the_largest(x, filters)
    if filters.min_p is not None:
        p = _softmax(x, passes)
        passes = passes & (p >= filters.min_p * p.amax(dim=1, keepdim=True))
    if filters.typical_p is not None:
        passes = _typical(x, passes, filters.typical_p)
    return passes


def _of_the_largest(x: Tensor, filters: Filters) -> Tensor:
    """What top_k leaves, and of that top_p."""
    ordered, ids = x.sort(dim=1, descending=True, stable=True)
    passes = ordered > -torch.inf
    if filters.top_k is not None:
        size = x.shape[1]
        last = ordered.gather(1, (filters.top_k.long() - 1).clamp(0, size - 1))
        passes = passes & ((ordered >= last) | (filters.top_k <= 0))
    if filters.top_p is not None:
        passes = _shortest(_softmax(ordered, passes), passes, filters.top_p)
    return torch.zeros_like(passes).scatter_(1, ids, passes)


def _typical(x: Tensor, passes: Tensor, mass: Tensor) -> Tensor:
    """The shortest run whose surprise is nearest to the entropy."""
    kept = x.masked_fill(~passes, -torch.inf)
    p, surprise = torch.softmax(kept, dim=1), -torch.log_softmax(kept, dim=1)
    entropy = -torch.xlogy(p, p).sum(dim=1, keepdim=True)
    ids = (surprise - entropy).abs().sort(dim=1, stable=True).indices
    ordered = _shortest(p.gather(1, ids), passes.gather(1, ids), mass)
    return torch.zeros_like(passes).scatter_(1, ids, ordered)


def _shortest(p: Tensor, passes: Tensor, mass: Tensor) -> Tensor:
    """The first that pass, in their order, whose probabilities reach ``mass``; all where it is 1."""
    missing = ((p.cumsum(dim=1) < mass) & passes).sum(dim=1, keepdim=True)
    is_first = torch.arange(p.shape[1], device=p.device) <= missing
    return passes & (is_first | (mass >= 1))


def _softmax(x: Tensor, passes: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(~passes, -torch.inf), dim=1)


def _floats(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of one length as float64, in one copy."""
    joined = np.stack([array.astype(np.float64) for array in arrays])
    return list(uploaded(torch.from_numpy(joined), device).unbind())
