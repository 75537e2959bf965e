"""The rotary embedding of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from manyhats.engine.model.rotary import Angles


def rotated(heads: Tensor, angles: Angles) -> Tensor:
    """Heads [N, H, K], the first ``rotary_dim`` values turned by halves; the angles are the rows'."""
    cos, sin = (part.unsqueeze(1) for part in angles)
    half = cos.shape[-1]
    first, second, rest = heads.split((half, half, heads.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
