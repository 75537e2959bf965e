"""Causal attention of a ragged batch: a shared beginning, rows that continue it, and a prefix before all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from manyhats.engine.model.architecture import Attention
from manyhats.trainer.model.blocked_attention import blocked_attention
from manyhats.trainer.model.rows import RowLayout

KeysAndValues = tuple[Tensor, Tensor]
"""Keys, rotated or used as they are, and values, with the same shape."""


def attend(
    queries: Tensor, own: KeysAndValues, prefix: KeysAndValues | None, layout: RowLayout, spec: Attention
) -> Tensor:
    """Attention of every token over those before it in its own row.

    A row's positions are the prefix, the shared beginning, and its own tokens, in that order; windows count them all.

    Args:
        queries: [N, H, K], rotated.
        own: [N, Hkv, K] each, of the tokens themselves.
        prefix: [P, Hkv, K] each, before all rows; None for none.
        layout: of the N tokens.
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
        outputs.append(layout.ragged(_attend_rows(padded[0], padded[1], padded[2], prefix, spec)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _joined(first: KeysAndValues, second: KeysAndValues) -> KeysAndValues:
    return torch.cat((first[0].to(second[0]), second[0])), torch.cat((first[1].to(second[1]), second[1]))


def _attend_rows(
    queries: Tensor, keys: Tensor, values: Tensor, before: KeysAndValues | None, spec: Attention
) -> Tensor:
    """Attention of B rows of T tokens, [B, T, H or Hkv, K], each over ``before`` [C, Hkv, K] and itself."""
    num_kv_heads = keys.shape[2]
    queries = queries.unflatten(2, (num_kv_heads, -1)).transpose(1, 2)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if before is not None:
        keys, values = (
            torch.cat((part.to(whole).transpose(0, 1).expand(keys.shape[0], -1, -1, -1), whole), dim=2)
            for part, whole in zip(before, (keys, values), strict=True)
        )
    return blocked_attention(queries, keys, values, spec).transpose(1, 2).flatten(2, 3)
