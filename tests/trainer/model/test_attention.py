"""Attention in blocks: outputs and gradients are those of attention written out in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.model.architecture import Attention
from manyhats.trainer.model.attention import BLOCK, attend
from manyhats.trainer.model.rows import row_layout

HEAD_DIM = 8


def attention(
    scale: float = 1.0, window: int | None = None, softcap: float | None = None, sees_all: bool = False
) -> Attention:
    """The numbers of heads are those of the tensors."""
    return Attention(
        num_heads=1,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        scale=scale,
        window=window,
        softcap=softcap,
        sees_all=sees_all,
    )


@dataclass(frozen=True)
class Population:
    """Rows behind a prefix and a shared beginning."""

    num_prefix: int
    num_shared: int
    rows: tuple[int, ...]
    num_kv_heads: int
    group: int
    spec: Attention
    seed: int

    def tensors(self) -> list[Tensor]:
        """Queries, keys and values of the tokens, then keys and values of the prefix."""
        generator = torch.Generator().manual_seed(self.seed)
        num_tokens = self.num_shared + sum(self.rows)
        heads = self.num_kv_heads * self.group
        shapes = [
            (num_tokens, heads, HEAD_DIM),
            *[(num_tokens, self.num_kv_heads, HEAD_DIM)] * 2,
            *[(self.num_prefix, self.num_kv_heads, HEAD_DIM)] * 2,
        ]
        return [torch.randn(shape, generator=generator) for shape in shapes]


lengths = st.sampled_from((1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3))
populations = st.builds(
    Population,
    num_prefix=st.sampled_from((0, 0, 1, 5)),
    num_shared=st.sampled_from((0, 0, 1, 9, BLOCK + 2)),
    rows=st.lists(lengths, min_size=1, max_size=4).map(tuple),
    num_kv_heads=st.sampled_from((1, 2)),
    group=st.sampled_from((1, 3)),
    spec=st.builds(
        attention,
        scale=st.sampled_from((0.35, 1.0)),
        window=st.sampled_from((None, 1, 6, BLOCK, BLOCK + 1)),
        softcap=st.sampled_from((None, 1.5)),
    ),
    seed=st.integers(0, 99),
)
two_way = st.builds(
    Population,
    num_prefix=st.sampled_from((0, 0, 1, 5)),
    num_shared=st.just(0),
    rows=st.lists(lengths, min_size=1, max_size=4).map(tuple),
    num_kv_heads=st.sampled_from((1, 2)),
    group=st.sampled_from((1, 3)),
    spec=st.builds(
        attention,
        scale=st.just(0.35),
        window=st.sampled_from((None, 1, 6, BLOCK, BLOCK + 1)),
        sees_all=st.just(True),
    ),
    seed=st.integers(0, 99),
)


def by_definition(population: Population, tensors: list[Tensor]) -> Tensor:
    """Every token by itself, in float64."""
    queries, keys, values, prefix_keys, prefix_values = (tensor.double() for tensor in tensors)
    spec, shared = population.spec, population.num_shared
    starts = torch.tensor([0, *population.rows]).cumsum(0) + shared
    rows = [range(shared)] + [
        range(int(start), int(start) + length) for start, length in zip(starts, population.rows, strict=False)
    ]
    out = torch.empty_like(queries)
    for number, row in enumerate(rows):
        for token in row:
            before = [*(range(shared) if number else ()), *range(row.start, token)]
            own = [*before, *range(token, row.stop if spec.sees_all else token + 1)]
            place = population.num_prefix + len(before)
            seen = spec.seen(place, population.num_prefix + len(own))
            all_keys = torch.cat((prefix_keys, keys[own]))[seen.start : seen.stop]
            all_values = torch.cat((prefix_values, values[own]))[seen.start : seen.stop]
            wide_keys, wide_values = (
                part.repeat_interleave(population.group, dim=1) for part in (all_keys, all_values)
            )
            scores = torch.einsum("hk,shk->hs", queries[token], wide_keys) * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            out[token] = torch.einsum("hs,shk->hk", scores.softmax(-1), wide_values)
    return out


@given(populations | two_way)
@settings(deadline=None, max_examples=100)
def test_outputs_and_gradients_are_those_of_the_definition(population: Population) -> None:
    tensors = population.tensors()
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(7))
    leaves, exact = ([tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2))
    layout = row_layout(population.rows, population.num_shared, torch.device("cpu"))
    prefix = (leaves[3], leaves[4]) if population.num_prefix else None
    out = attend(leaves[0], (leaves[1], leaves[2]), prefix, layout, population.spec)
    expected = by_definition(population, exact)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-4)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for leaf, wanted in zip(leaves, exact, strict=True):
        if leaf.numel():
            assert leaf.grad is not None
            assert wanted.grad is not None
            torch.testing.assert_close(leaf.grad, wanted.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [(9, 9), (9, 1, 4)])
def test_bfloat16_keeps_scores_in_float32(rows: tuple[int, ...]) -> None:
    """Scores of 100, 100.125, …: in bfloat16, whose step is 0.5 there, four at a time would tie."""
    num_tokens = sum(rows)
    queries = torch.ones(num_tokens, 2, HEAD_DIM)
    keys = torch.full((num_tokens, 1, HEAD_DIM), 12.0)
    keys[:, 0, 0] = torch.cat([16 + 0.125 * torch.arange(length) for length in rows])
    values = torch.randn(num_tokens, 1, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    spec, layout = attention(), row_layout(rows, 0, torch.device("cpu"))
    narrow = attend(queries.bfloat16(), (keys.bfloat16(), values.bfloat16()), None, layout, spec)
    exact = attend(queries, (keys, values.bfloat16().float()), None, layout, spec)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), exact, atol=0.01, rtol=0.01)


def test_long_rows_need_no_scores_of_all_pairs() -> None:
    """What is kept for the backward pass grows with the rows' length, not with its square."""
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    length = 6 * BLOCK
    tensors = [torch.randn(length, 1, HEAD_DIM).requires_grad_() for _ in range(3)]
    layout, spec = row_layout((length,), 0, torch.device("cpu")), attention()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attend(tensors[0], (tensors[1], tensors[2]), None, layout, spec)
    assert sum(kept) == 4 * length * HEAD_DIM
