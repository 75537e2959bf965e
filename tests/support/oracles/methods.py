"""Methods' own equations, as their papers have them: oracles of what the methods are lowered to."""

from __future__ import annotations

import torch
from torch import Tensor


def adalora_delta(x: Tensor, a: Tensor, e: Tensor, b: Tensor, scale: float) -> Tensor:
    """Update of a linear's output by singular values: ``scale · (x (e ⊙ A)ᵀ) Bᵀ``.

    Args:
        x: [..., d_in]; the input of the base linear.
        a: [R, d_in]; right singular vectors.
        e: [R, 1]; singular values.
        b: [d_out, R]; left singular vectors.
        scale: dimensionless; see ``adalora_scale``.

    Returns:
        [..., d_out]; the caller adds it to the base output.

    Source: Zhang et al. 2023 (arXiv:2303.10512), equation 3.
    """
    return (x @ (a * e).T) @ b.T * scale


def dora_output(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, gain: Tensor, bias: Tensor | None
) -> Tensor:
    """Output of the adapted linear: ``base + (c − 1)(base − bias) + c · scale · (x Aᵀ) Bᵀ``.

    Args:
        base: [..., d_out]; the base linear's output, bias included.
        x: [..., d_in]; its input.
        a, b, scale: as of ``updated_lengths``.
        gain: c [d_out]; as of ``dora_gain``.
        bias: [d_out]; the base linear's; it keeps its length.

    Returns:
        [..., d_out].

    Source: Liu et al. 2024 (arXiv:2402.09353), section 4.3.
    """
    unbiased = base if bias is None else base - bias
    return base + (gain - 1) * unbiased + gain * scale * ((x @ a.T) @ b.T)


def ia3_output(y: Tensor, vector: Tensor) -> Tensor:
    """A linear's output rescaled, its bias included: ``y ⊙ l``; y [..., d_out], l [d_out].

    Source: Liu et al. 2022 (arXiv:2205.05638), section 3.3, on keys and values.
    """
    return y * vector


def ia3_input(x: Tensor, vector: Tensor) -> Tensor:
    """A linear's input rescaled: ``x ⊙ l``; x [..., d_in], l [d_in].

    Source: Liu et al. 2022 (arXiv:2205.05638), section 3.3, inside the feed-forward.
    """
    return x * vector


def vera_delta(x: Tensor, a: Tensor, b: Tensor, d_vector: Tensor, b_vector: Tensor) -> Tensor:
    """Update of a linear's output: ``λ_b ⊙ (λ_d ⊙ (x A[:, :d_in]ᵀ)) B[:d_out]ᵀ``.

    Args:
        x: [..., d_in]; the input of the base linear.
        a: [R, at least d_in]; shared by all linears.
        b: [at least d_out, R]; shared too.
        d_vector: λ_d [R].
        b_vector: λ_b [d_out].

    Returns:
        [..., d_out]; the caller adds it to the base output.

    Source: Kopiczko et al. 2024 (arXiv:2310.11454), equation 2.
    """
    inner = (x @ a[:, : x.shape[-1]].T) * d_vector
    return (inner @ b[: b_vector.shape[0]].T) * b_vector


def prepend_prompt(prompt: Tensor, embedded: Tensor) -> Tensor:
    """What the decoder's layers run on: ``[prompt; embedded]``, at positions 0, 1, ….

    Args:
        prompt: [P, D].
        embedded: [T, D]; the real tokens.

    Returns:
        [P + T, D].

    Source: Lester et al. 2021 (arXiv:2104.08691), section 2.
    """
    return torch.cat((prompt, embedded))
