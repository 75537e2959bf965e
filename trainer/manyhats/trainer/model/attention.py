"""Attention under autograd, a block of queries at a time: scores are never held for all queries, and never kept.

All heads of a query group read the same keys, so their queries are rows of one product. Scores, softmax and their
gradients are float32; what multiplies values, and what gradients multiply, is the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyhats.engine.model.architecture import Attention
from manyhats.trainer.model.rows import RowLayout

KeysAndValues = tuple[Tensor, Tensor]
"""Keys, rotated or used as they are, and values, with the same shape."""

BLOCK = 64
"""Queries per block."""


def attend(
    queries: Tensor, own: KeysAndValues, prefix: KeysAndValues | None, layout: RowLayout, spec: Attention
) -> Tensor:
    """Attention of every token over those before it in its own row, or, where tokens see all, over its whole row.

    A row's positions are the prefix, the shared beginning, and its own tokens, in that order; windows count them all.

    Args:
        queries: [N, H, K], rotated.
        own: [N, Hkv, K] each, of the tokens themselves.
        prefix: [P, Hkv, K] each, before all rows; None for none.
        layout: of the N tokens; nothing is shared where tokens see all.
        spec: the layer's.

    Returns:
        [N, H, K].
    """
    size = layout.num_shared
    outputs = []
    if size:
        beginning = own[0][:size], own[1][:size]
        rows = queries[:size].unsqueeze(0), beginning[0].unsqueeze(0), beginning[1].unsqueeze(0)
        outputs.append(_attend_rows(*rows, prefix, spec)[0])
        prefix = beginning if prefix is None else _joined(prefix, beginning)
    if layout.num_rows:
        padded = [layout.padded(part[size:]) for part in (queries, *own)]
        # Causal attention never sees the padding, which comes last.
        lengths = layout.lengths if spec.sees_all else None
        outputs.append(layout.ragged(_attend_rows(padded[0], padded[1], padded[2], prefix, spec, lengths)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _joined(first: KeysAndValues, second: KeysAndValues) -> KeysAndValues:
    return torch.cat((first[0].to(second[0]), second[0])), torch.cat((first[1].to(second[1]), second[1]))


def _attend_rows(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    before: KeysAndValues | None,
    spec: Attention,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention of B rows of T tokens, [B, T, H or Hkv, K], each over ``before`` [C, Hkv, K] and itself.

    ``lengths`` [B] are those of the rows without padding; None if there is none, or none that is seen.
    """
    num_kv_heads = keys.shape[2]
    queries = queries.unflatten(2, (num_kv_heads, -1)).transpose(1, 2)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if before is not None:
        keys, values = (
            torch.cat((part.to(whole).transpose(0, 1).expand(keys.shape[0], -1, -1, -1), whole), dim=2)
            for part, whole in zip(before, (keys, values), strict=True)
        )
    return blocked_attention(queries, keys, values, spec, lengths).transpose(1, 2).flatten(2, 3)


def blocked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, spec: Attention, lengths: Tensor | None = None
) -> Tensor:
    """Attention of B rows whose last query and last key are at the same position.

    Args:
        queries: [B, Hkv, T, G, K]; query head h is head h % G of group h // G.
        keys: [B, Hkv, C + T, K].
        values: the same shape.
        spec: gives scale, window and cap, and whether queries see all keys.
        lengths: [B], how many of the T are tokens, where queries see all keys; None for all of them.

    Returns:
        [B, Hkv, T, G, K], dtype of the queries.
    """
    mixed: Tensor = _BlockedAttention.apply(queries, keys, values, spec, lengths)  # type: ignore[no-untyped-call]
    return mixed


class _BlockedAttention(torch.autograd.Function):
    """``O = P V``, ``P = softmax(cap(scale · Q Kᵀ))``; with ``D = rowsum(dO · O)``, ``dS = P · (dO Vᵀ − D)``."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, spec: Attention, lengths: Tensor | None
    ) -> Tensor:
        q, k, v = _as_matrices(queries, keys, values)
        wide_k = k.float()
        out = torch.empty_like(q)
        for block in _blocks(queries, keys, spec, lengths):
            scores, _ = block.scores(q, wide_k, spec)
            out[:, block.rows] = scores.softmax(-1).to(v.dtype) @ v[:, block.seen]
        ctx.save_for_backward(queries, keys, values, out, lengths)
        ctx.spec = spec
        return out.view(queries.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values, out, lengths = ctx.saved_tensors
        spec: Attention = ctx.spec
        q, k, v = _as_matrices(queries, keys, values)
        wide_k, wide_v = k.float(), v.float()
        d_out = grad.reshape(q.shape)
        wide_d_out = d_out.float()
        means = (wide_d_out * out).sum(-1, keepdim=True)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
        for block in _blocks(queries, keys, spec, lengths):
            rows, seen = block.rows, block.seen
            scores, slope = block.scores(q, wide_k, spec)
            weights = scores.softmax(-1)
            d_v[:, seen] += weights.to(v.dtype).transpose(1, 2) @ d_out[:, rows]
            d_scores = wide_d_out[:, rows] @ wide_v[:, seen].transpose(1, 2)
            d_scores.sub_(means[:, rows]).mul_(weights)
            if slope is not None:
                d_scores.mul_(slope)
            narrow = d_scores.to(q.dtype)
            d_q[:, rows] = narrow @ k[:, seen]
            d_k[:, seen] += narrow.transpose(1, 2) @ q[:, rows]
        return (
            d_q.mul_(spec.scale).view(queries.shape),
            d_k.mul_(spec.scale).to(k.dtype).view(keys.shape),
            d_v.to(v.dtype).view(values.shape),
            None,
            None,
        )


def _as_matrices(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B · Hkv, T · G, K], and twice [B · Hkv, C + T, K]."""
    return (
        queries.flatten(2, 3).flatten(0, 1).contiguous(),
        keys.flatten(0, 1).contiguous(),
        values.flatten(0, 1).contiguous(),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Some queries, as rows of T · G, and the keys that any of them sees.

    Attributes:
        hidden: [rows, the last keys seen] bool, or [B · Hkv, 1 or rows, keys]: which of those keys each query does not
            see; None if it sees all.
    """

    rows: slice
    seen: slice
    hidden: Tensor | None

    def scores(self, q: Tensor, wide_k: Tensor, spec: Attention) -> tuple[Tensor, Tensor | None]:
        """Capped scores, −∞ where a key is hidden, and the cap's slope ``1 − tanh²`` (None without a cap); float32."""
        queries, keys = q[:, self.rows].float(), wide_k[:, self.seen].transpose(1, 2)
        scores = torch.baddbmm(queries.new_empty(1, 1, 1), queries, keys, beta=0, alpha=spec.scale)
        slope = None
        if spec.softcap is not None:
            capped = scores.div_(spec.softcap).tanh_()
            slope = 1 - capped.square()
            scores = capped.mul_(spec.softcap)
        if self.hidden is not None:
            scores[..., scores.shape[-1] - self.hidden.shape[-1] :].masked_fill_(self.hidden, float("-inf"))
        return scores, slope


def _blocks(
    queries: Tensor, keys: Tensor, spec: Attention, lengths: Tensor | None = None
) -> Iterator[_Block]:
    """All queries, block by block; without a window, only the block's own keys can be hidden from them."""
    num_queries, group = queries.shape[2:4]
    if spec.sees_all:
        yield from _two_way_blocks(queries, keys, spec.window, lengths)
        return
    before = keys.shape[2] - num_queries
    for first in range(0, num_queries, BLOCK):
        last = min(first + BLOCK, num_queries)
        start = 0 if spec.window is None else max(0, before + first - spec.window + 1)
        own = torch.arange(before + first, before + last, device=queries.device)
        masked = own if spec.window is None else torch.arange(start, before + last, device=queries.device)
        at = own.repeat_interleave(group).unsqueeze(1)
        hidden = masked > at
        if spec.window is not None:
            hidden |= masked <= at - spec.window
        yield _Block(slice(first * group, last * group), slice(start, before + last), hidden)


def _two_way_blocks(
    queries: Tensor, keys: Tensor, window: int | None, lengths: Tensor | None
) -> Iterator[_Block]:
    """All queries, which see the keys of their row on both sides, but the padding at its end."""
    num_keys, (num_queries, group) = keys.shape[2], queries.shape[2:4]
    before = num_keys - num_queries
    padding = None if lengths is None else _padding(lengths, num_keys, before, queries.shape[1])
    for first in range(0, num_queries, BLOCK):
        last = min(first + BLOCK, num_queries)
        rows = slice(first * group, last * group)
        if window is None:
            yield _Block(rows, slice(0, num_keys), padding)
            continue
        seen = slice(max(0, before + first - window + 1), min(num_keys, before + last + window - 1))
        places = torch.arange(seen.start, seen.stop, device=queries.device)
        at = torch.arange(before + first, before + last, device=queries.device)
        distances = (places - at.repeat_interleave(group).unsqueeze(1)).abs()
        hidden = distances >= window
        if padding is not None:
            # Padding sees itself: a softmax over nothing would be NaN, and so would gradients.
            hidden = hidden | (padding[..., seen] & (distances > 0))
        yield _Block(rows, seen, hidden)


def _padding(lengths: Tensor, num_keys: int, before: int, num_kv_heads: int) -> Tensor:
    """Which keys of B rows are padding: [B · Hkv, 1, keys] bool."""
    places = torch.arange(num_keys, device=lengths.device) - before
    is_padding = places >= lengths.unsqueeze(1)
    return is_padding.repeat_interleave(num_kv_heads, dim=0).unsqueeze(1)
