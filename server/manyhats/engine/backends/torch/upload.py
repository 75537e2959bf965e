"""From the host to the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def uploaded(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; from pinned memory its copy is queued behind what runs there."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def uploaded_ints(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays of integers as int64 tensors of the same shapes, in one copy."""
    if not arrays:
        return []
    joined = np.concatenate([array.reshape(-1).astype(np.int64) for array in arrays])
    parts = uploaded(torch.from_numpy(joined), device).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
