"""Activations of feed-forwards on CUDA, and the scaling of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

from manyhats.engine.backends.cuda.triton import activations as kernels
from manyhats.engine.model.architecture import FeedForward, Head

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1024


def activate(x: Tensor, feed_forward: FeedForward, out: Tensor) -> None:
    """Launches ``out = act(gate) · up``, or without a gate ``out = act(x)``.

    Args:
        x: [M, 2 · I] float32 or bfloat16, gate and up side by side, or [M, I]; rows may be apart.
        feed_forward: says which activation, and whether there is a gate.
        out: [M, I] float32 or bfloat16.
    """
    size = out.shape[1]
    kernels.activate[(out.shape[0], triton.cdiv(size, _BLOCK))](
        x,
        out,
        x.stride(0),
        size,
        NAME=feed_forward.activation,
        IS_GATED=feed_forward.is_gated,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )


def scale_logits(logits: Tensor, head: Head) -> None:
    """Launches ``c · tanh(logits / divisor / c)`` in place, or what the head has of it; logits are [M, V] float32."""
    if head.divisor == 1.0 and head.softcap is None:
        return
    kernels.scale_logits[(logits.shape[0], triton.cdiv(logits.shape[1], _BLOCK))](
        logits,
        logits.stride(0),
        logits.shape[1],
        head.divisor,
        head.softcap or 1.0,
        HAS_CAP=head.softcap is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
