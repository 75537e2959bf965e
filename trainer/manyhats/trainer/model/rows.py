"""Where the tokens of a ragged batch are when its rows are padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, eq=False)
class RowLayout:
    """The layout of N tokens: first those that every row continues, then the rows end to end.

    Attributes:
        num_shared: S, the number of first tokens, a sequence that all B rows continue.
        num_rows: B.
        max_length: T, the longest row's.
        places: [N − S] int64, the index of each row token in [B · T]; None if all rows have length T.
        lengths: [B] int64, of the rows; None if all are T.
    """

    num_shared: int
    num_rows: int
    max_length: int
    places: Tensor | None
    lengths: Tensor | None

    def padded(self, tokens: Tensor) -> Tensor:
        """The rows' tokens [N − S, …] as [B, T, …], with zeros as padding."""
        if self.places is None:
            return tokens.view(self.num_rows, self.max_length, *tokens.shape[1:])
        flat: Tensor = _Scatter.apply(tokens, self.places, self.num_rows * self.max_length)  # type: ignore[no-untyped-call]
        return flat.view(self.num_rows, self.max_length, *tokens.shape[1:])

    def ragged(self, rows: Tensor) -> Tensor:
        """The inverse of ``padded``."""
        flat = rows.flatten(0, 1)
        if self.places is None:
            return flat
        tokens: Tensor = _Gather.apply(flat, self.places)  # type: ignore[no-untyped-call]
        return tokens


def row_layout(segments: Sequence[int], num_shared: int, device: torch.device) -> RowLayout:
    """The layout of rows of these lengths after ``num_shared`` tokens, which the lengths do not include."""
    longest = max(segments, default=0)
    places = own = None
    if any(length != longest for length in segments):
        lengths = torch.tensor(segments)
        starts = torch.repeat_interleave(torch.arange(len(segments)) * longest, lengths)
        firsts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        places = (starts + torch.arange(int(lengths.sum())) - firsts).to(device)
        own = lengths.to(device)
    return RowLayout(num_shared, len(segments), longest, places, own)


class _Scatter(torch.autograd.Function):
    """Scatter rows of x to distinct places among ``size`` rows, the others zero; the inverse of ``_Gather``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """Gather rows of x from distinct places, so that the gradient needs no sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        spread = grad.new_zeros(ctx.size, *grad.shape[1:])
        return spread.index_copy_(0, ctx.saved_tensors[0], grad), None
