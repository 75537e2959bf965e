"""Initial values of parameters, from a separate generator: the global one is left alone."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn


def kaiming_uniform(d_out: int, d_in: int, generator: Generator) -> nn.Parameter:
    """A matrix [d_out, d_in] between ±1/√d_in: Kaiming's bound for a leaky ReLU of slope √5, as in ``nn.Linear``.

    Source: He et al. 2015 (arXiv:1502.01852), equation 14.
    """
    return nn.Parameter(_uniform((d_out, d_in), d_in**-0.5, generator))


def linear(name: str, d_in: int, d_out: int, generator: Generator) -> dict[str, nn.Parameter]:
    """``{name}.weight`` [d_out, d_in] and ``{name}.bias`` [d_out] initialized as in ``nn.Linear``."""
    return {
        f"{name}.weight": kaiming_uniform(d_out, d_in, generator),
        f"{name}.bias": nn.Parameter(_uniform((d_out,), d_in**-0.5, generator)),
    }


def normal(rows: int, columns: int, generator: Generator) -> nn.Parameter:
    """A matrix from the standard normal distribution, initialized as in ``nn.Embedding``."""
    return nn.Parameter(torch.randn(rows, columns, generator=generator))


def zeros(*shape: int) -> nn.Parameter:
    """Zeros."""
    return nn.Parameter(torch.zeros(shape))


def _uniform(shape: tuple[int, ...], bound: float, generator: Generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
