"""Compacter's projections: sums of Kronecker products, multiplied out to plain matrices when an adapter is loaded.

A projection is ``y = x H + b`` with ``H = Σᵢ rule[i] ⊗ W[i]``, [in, out]. The library makes H at every call and
multiplies with it, so a plain matrix Hᵀ gives the same result.

Source: Zhang et al. 2021 (arXiv:2102.08597); Mahabadi et al. 2021 (arXiv:2106.04647).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manyhats.adapters.errors import AdapterInvalidError
from manyhats.adapters.formats.adapterhub.bottleneck import Block, PhmConfig

Shapes = dict[str, tuple[int, ...]]


def kronecker_sum(rule: Tensor, w: Tensor) -> Tensor:
    """``H = Σᵢ rule[i] ⊗ W[i]``.

    Args:
        rule: [n, n, n].
        w: [n, d_in / n, d_out / n].

    Returns:
        [d_in, d_out].
    """
    return torch.stack([torch.kron(a, b) for a, b in zip(rule, w, strict=True)]).sum(0)


def phm_shapes(phm: PhmConfig, block: Block, module: str, direction: str, d_in: int, d_out: int) -> Shapes:
    """The tensors of one projection, by plain name.

    Args:
        phm: parsed.
        block: the adapter that it belongs to.
        module: plain name of the projection's module, with a dot at its end.
        direction: ``down`` or ``up``.
        d_in, d_out: features in and out.

    Raises:
        AdapterInvalidError: n does not divide both of them.
    """
    n, rank = phm.dim, phm.rank
    if d_in % n or d_out % n:
        raise AdapterInvalidError("phm_dim", f"{n} does not divide both {d_in} and {d_out}")
    w, rule = _names(phm, block, module, direction)
    shapes: Shapes = {}
    if phm.is_w_factorized:
        shapes |= {f"{w}_left": (n, d_in // n, rank), f"{w}_right": (n, rank, d_out // n)}
    else:
        shapes[w] = (n, d_in // n, d_out // n)
    if phm.is_rule_factorized:
        shapes |= {f"{rule}_left": (n, n, 1), f"{rule}_right": (n, 1, n)}
    else:
        shapes[rule] = (n, n, n)
    if phm.has_bias:
        shapes[f"{module}b"] = (d_out,)
    return shapes


def phm_matrix(
    phm: PhmConfig, block: Block, module: str, direction: str, read: Callable[[str], Tensor]
) -> Tensor:
    """The projection's matrix, [d_out, d_in] float32; ``read`` gives a tensor by plain name, float32."""
    w, rule = _names(phm, block, module, direction)
    return kronecker_sum(
        _product(read, rule, phm.is_rule_factorized), _product(read, w, phm.is_w_factorized)
    ).T.contiguous()


def _product(read: Callable[[str], Tensor], name: str, is_factorized: bool) -> Tensor:
    return torch.bmm(read(f"{name}_left"), read(f"{name}_right")) if is_factorized else read(name)


def _names(phm: PhmConfig, block: Block, module: str, direction: str) -> tuple[str, str]:
    """Plain names of W and of the rule."""
    w = f"{block.shared}W_{direction}" if phm.is_w_shared else f"{module}W"
    rule = f"{block.shared}phm_rule" if phm.is_rule_shared else f"{module}phm_rule"
    return w, rule
