"""How the rows of a step choose their tokens, as the kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """M rows over a vocabulary of V; what each filter does, ``SamplingParams`` says.

    Attributes:
        temperature: [M] float32; 0 takes the largest logit, the smallest id among equals.
        top_k: [M] int64; 0 for all.
        top_p: [M] float64. min_p, typical_p: the same.
        point: [M] float64 in [0, 1): the token is the first, in order of ids, whose cumulative probability is over it.
        edit_start: [M + 1] int64, each row's first edit.
        edit_ids: [E] int64 in [0, V), tokens whose logit is another than the row's.
        edit_values: [E] float32, which; of two for one token the later counts. −∞ never comes.
        mask_rows: [M] int64, each row's mask; −1 for none.
        masks: [K, V] bool, the tokens that may come.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor
    point: Tensor
    edit_start: Tensor
    edit_ids: Tensor
    edit_values: Tensor
    mask_rows: Tensor
    masks: Tensor
