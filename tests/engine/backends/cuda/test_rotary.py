"""Queries and keys as the torch backend rotates them, and the cells that keys and values get."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.cuda.attention.rotary import rotate_and_store
from manyhats.engine.backends.torch.model import rotated
from manyhats.engine.model.architecture import Attention, Norm, Rope
from manyhats.engine.model.rotary import RotaryTables
from manyhats.engine.model.weights import NormWeight
from support.factories.architectures import make_architecture
from support.gpu.compiling import faults_of

BLOCKS, BLOCK, POSITIONS = 5, 4, 50


def attention_of(
    heads: int, kv_heads: int, size: int, rotary: int, norm: Norm | None = None, scaling: float = 1.0
) -> Attention:
    rope = Rope(tuple(0.7**i for i in range(rotary // 2)), scaling) if rotary else None
    return Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        scale=1.0,
        rope=rope,
        query_norm=norm,
        key_norm=norm,
    )


def table_of(attention: Attention) -> tuple[Tensor, Tensor]:
    architecture = make_architecture(attention, max_context_length=POSITIONS)
    cos, sin = RotaryTables(architecture).tables[attention.rope]
    return cos.to(DEVICE), sin.to(DEVICE)


def weight_of(attention: Attention, norm: Norm | None, heads: int) -> NormWeight | None:
    if norm is None:
        return None
    shape = {"row": (heads * attention.head_dim,), "head": (attention.head_dim,)}.get(
        norm.span, (heads, attention.head_dim)
    )
    weight = torch.randn(shape, device=DEVICE)
    return NormWeight(weight, torch.randn(shape, device=DEVICE) if norm.has_bias else None)


class Step:
    """N rows of random queries, keys and values, in cells in no order."""

    def __init__(self, attention: Attention, num_rows: int, dtype: torch.dtype, seed: int = 0) -> None:
        torch.manual_seed(seed)
        width = attention.query_size + 2 * attention.key_size
        self.attention = attention
        self.qkv = torch.randn(num_rows, width + 3, device=DEVICE).to(dtype)[:, :width]
        self.positions = torch.randint(POSITIONS, (num_rows,), dtype=torch.int32, device=DEVICE)
        self.cells = torch.randperm(BLOCKS * BLOCK, device=DEVICE)[:num_rows]
        self.query_weight = weight_of(attention, attention.query_norm, attention.num_heads)
        self.key_weight = weight_of(attention, attention.key_norm, attention.num_kv_heads)

    def run(
        self, dtype: torch.dtype = torch.bfloat16, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and keys and values of all cells, NaN where nothing was written."""
        attention, qkv = self.attention, self.qkv[rows]
        size = attention.head_dim
        queries = torch.full((len(qkv), attention.num_heads, size), torch.nan, device=DEVICE).to(dtype)
        shape = (BLOCKS, BLOCK, attention.num_kv_heads, size)
        keys, values = (torch.full(shape, torch.nan, device=DEVICE).to(dtype) for _ in "kv")
        rotate_and_store(
            qkv,
            attention,
            table_of(attention),
            self.positions[rows],
            self.cells[rows],
            self.query_weight,
            self.key_weight,
            queries,
            keys,
            values,
        )
        return queries, keys.flatten(0, 1), values.flatten(0, 1)

    def wanted(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the rows, in plain torch of a dtype."""
        attention = self.attention
        parts = self.qkv.to(dtype).split(
            (attention.query_size, attention.key_size, attention.key_size), dim=1
        )
        queries = normed(parts[0], attention.query_norm, self.query_weight)
        keys = normed(parts[1], attention.key_norm, self.key_weight)
        heads = [part.unflatten(1, (-1, attention.head_dim)) for part in (queries, keys, parts[2])]
        cos, sin = (part[self.positions.long()].to(dtype) for part in table_of(attention))
        return rotated(heads[0], (cos, sin)), rotated(heads[1], (cos, sin)), heads[2]


def normed(x: Tensor, norm: Norm | None, weight: NormWeight | None) -> Tensor:
    if norm is None or weight is None:
        return x
    v = (
        x.unflatten(1, (-1, *weight.weight.shape[-1:]))
        if norm.span != "own_head"
        else x.unflatten(1, weight.weight.shape)
    )
    if norm.kind == "layer":
        v = v - v.mean(-1, keepdim=True)
    v = v / torch.sqrt(v.square().mean(-1, keepdim=True) + norm.eps) * weight.weight.to(x.dtype)
    return (v if weight.bias is None else v + weight.bias.to(x.dtype)).flatten(1)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.sampled_from([(16, 16), (20, 20), (20, 6), (16, 0), (24, 8)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1.0, 1.17]),
    st.integers(0, 2**16),
)
def test_queries_keys_and_values_have_the_bits_of_torch(
    heads: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, scaling: float, seed: int
) -> None:
    """Of whole and of partial rotations, of none, and of scaled ones."""
    step = Step(attention_of(*heads, *size, scaling=scaling), 3, dtype, seed)
    queries, keys, values = step.run()
    wanted = [part.bfloat16() for part in step.wanted(torch.float32)]
    assert torch.equal(queries, wanted[0])
    assert torch.equal(keys[step.cells], wanted[1])
    assert torch.equal(values[step.cells], wanted[2])


def test_other_cells_are_left_alone() -> None:
    step = Step(attention_of(2, 1, 16, 16), 3, torch.float32)
    _, keys, values = step.run()
    written = torch.zeros(BLOCKS * BLOCK, dtype=torch.bool, device=DEVICE).index_fill(0, step.cells, True)
    for part in (keys, values):
        assert torch.equal(~part.isnan().all(2).all(1), written)


@pytest.mark.parametrize("span", ["row", "head", "own_head"])
@pytest.mark.parametrize(
    "norm", [Norm(1e-6), Norm(1e-2, kind="layer"), Norm(1e-5, kind="layer", has_bias=True)], ids=repr
)
def test_queries_and_keys_are_normed_first(norm: Norm, span: str) -> None:
    step = Step(attention_of(4, 2, 20, 12, replace(norm, span=span)), 2, torch.float32)
    queries, keys, values = step.run(torch.float32)
    wanted = step.wanted(torch.float64)
    for found, exact in zip((queries, keys[step.cells], values[step.cells]), wanted, strict=True):
        assert (found.double() - exact).norm() <= 2e-6 * exact.norm()


def test_a_norm_may_be_of_queries_or_of_keys_alone() -> None:
    both = attention_of(2, 1, 16, 16, Norm(1e-6, span="head"))
    for attention in (replace(both, key_norm=None), replace(both, query_norm=None)):
        step = Step(attention, 2, torch.float32)
        queries, keys, _ = step.run(torch.float32)
        wanted = step.wanted(torch.float64)
        assert (queries.double() - wanted[0]).norm() <= 2e-6 * wanted[0].norm()
        assert (keys[step.cells].double() - wanted[1]).norm() <= 2e-6 * wanted[1].norm()


def test_a_row_has_the_same_bits_alone() -> None:
    step = Step(attention_of(4, 2, 20, 12, Norm(1e-6, span="row")), 5, torch.bfloat16)
    queries, keys, values = step.run()
    alone = step.run(rows=slice(3, 4))
    cell = step.cells[3]
    assert torch.equal(alone[0][0], queries[3])
    assert torch.equal(alone[1][cell], keys[cell])
    assert torch.equal(alone[2][cell], values[cell])


def test_rotary_compiles() -> None:
    assert faults_of("support.gpu.entries.rotary") == []
