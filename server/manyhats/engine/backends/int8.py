"""Keys and values as int8, with a scale for each head of each cell."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest ``values · scale``, symmetric around 0: scale = max |x| / 127, values = x / scale, rounded to even.

    Args:
        x: [..., K] float32, heads of keys or values.

    Returns:
        values [..., K] int8, and scales [...] float32. A head that is not finite has a scale that is not either.
    """
    scales = x.abs().amax(dim=-1) / LARGEST
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(-1)
    values = (x / divisors).round().clamp(-LARGEST, LARGEST).nan_to_num(0.0)
    return values.to(torch.int8), scales


def dequantized(values: Tensor, scales: Tensor) -> Tensor:
    """``values · scale``: [..., K] float32."""
    return values.float() * scales.unsqueeze(-1)
