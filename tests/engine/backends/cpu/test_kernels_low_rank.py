from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.adapters.primitives import LoweredAdapter, LowRank
from manyhats.adapters.sites import Site
from manyhats.engine.backends.cpu.adapters.slots import CpuAdapterSlots
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.errors import ModelError
from support.factories.architectures import make_architecture, make_attention
from support.harnesses.kernels import new_slots, put
from support.oracles.operations import ReferenceKernels

ARCHITECTURE = make_architecture(
    make_attention(6, 2, 16, scale=0.25, rotary_dim=16), num_layers=2, width=72, vocab_size=10
)
FUSED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
SHAPES = {
    "q_proj": (64, 96),
    "k_proj": (64, 32),
    "v_proj": (64, 32),
    "o_proj": (96, 64),
    "gate_proj": (64, 72),
    "up_proj": (64, 72),
    "down_proj": (72, 64),
}
NUM_SLOTS = 40
POPULATIONS: dict[str, Callable[[int], int]] = {
    "base only": lambda row: 0,
    "identical": lambda row: 8,
    "distinct": lambda row: row % (NUM_SLOTS - 1) + 1,
    "skewed": lambda row: 3 if row % 4 else row % 5,
}


def make_adapter(seed: int, rank: int | None = None) -> LoweredAdapter:
    """Random sites of random ranks from 1 to 64, or all sites of one rank."""
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for layer in range(ARCHITECTURE.num_layers):
        for name, (d_in, d_out) in SHAPES.items():
            if rank is None and random.random() < 0.35:
                continue
            r = rank or int(random.choice([1, 2, 3, 4, 5, 8, 16, 33, 64]))
            a = torch.randn(r, d_in, generator=generator) * d_in**-0.5
            b = torch.randn(d_out, r, generator=generator) * r**-0.5
            deltas.append(LowRank(Site(layer, name), a, b, float(random.uniform(-2, 2))))
    return LoweredAdapter(f"adapter {seed}", tuple(deltas))


def no_linear(x: Tensor) -> Tensor:
    raise AssertionError("no adapter here rescales an input")


def rows_of(slots: list[int]) -> AdapterRows:
    """What a batch would say of rows with these slots."""
    return AdapterRows.of(np.array(slots, dtype=np.int32))


def width(fused: str) -> tuple[int, int]:
    return SHAPES[FUSED[fused][0]][0], sum(SHAPES[name][1] for name in FUSED[fused])


def inputs(count: int, fused: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = width(fused)
    return torch.randn(count, d_in, generator=generator), torch.randn(count, d_out, generator=generator)


def add(slots: Any, fused: str, layer: int, x: Tensor, y: Tensor, rows: list[int]) -> Tensor:
    y = y.clone()
    slots.add_deltas(fused, layer, x, y, rows_of(rows), no_linear)
    return y


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """The same adapters on both backends, and on one thread."""
    dtype = str(request.param)
    slots: dict[str, Any] = {
        "cpu": new_slots(CpuKernels(2), ARCHITECTURE, NUM_SLOTS, dtype),
        "one thread": new_slots(CpuKernels(1), ARCHITECTURE, NUM_SLOTS, dtype),
        "reference": new_slots(ReferenceKernels(), ARCHITECTURE, NUM_SLOTS, dtype),
    }
    for slot in range(1, NUM_SLOTS):
        for backend in slots.values():
            put(backend, slot, make_adapter(slot))
    return slots


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("fused", FUSED)
def test_equals_the_reference_for_every_population(
    loaded: Mapping[str, Any], fused: str, population: str
) -> None:
    rows = [POPULATIONS[population](row) for row in range(33)]
    x, y = inputs(33, fused)
    for layer in range(ARCHITECTURE.num_layers):
        actual = add(loaded["cpu"], fused, layer, x, y, rows)
        expected = add(loaded["reference"], fused, layer, x, y, rows)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
        base_rows = [row for row in range(33) if rows[row] == 0]
        assert torch.equal(actual[base_rows], y[base_rows])
        assert torch.equal(actual, y) == torch.equal(expected, y)


@settings(max_examples=20, deadline=None)
@given(
    slots=st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=24),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_a_row_is_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(
    loaded: Mapping[str, Any], slots: list[int], seed: int, data: st.DataObject
) -> None:
    fused = data.draw(st.sampled_from(sorted(FUSED)))
    x, y = inputs(len(slots), fused, seed)
    whole = add(loaded["cpu"], fused, 1, x, y, slots)
    assert torch.equal(add(loaded["one thread"], fused, 1, x, y, slots), whole)
    for row, slot in enumerate(slots):
        alone = add(loaded["cpu"], fused, 1, x[row : row + 1], y[row : row + 1], [slot])
        assert torch.equal(alone[0], whole[row])
    order = data.draw(st.permutations(range(len(slots))))
    mixed = add(loaded["cpu"], fused, 1, x[order], y[order], [slots[row] for row in order])
    assert torch.equal(mixed, whole[order])


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7, 64, 65, 200])
def test_every_rank(rank: int) -> None:
    slots, oracle = (
        new_slots(kernels, ARCHITECTURE, 3, "float32") for kernels in (CpuKernels(2), ReferenceKernels())
    )
    x, y = inputs(5, "gate_up")
    for backend in (slots, oracle):
        put(backend, 2, make_adapter(rank, rank=rank))
    rows = [2, 0, 2, 2, 2]
    torch.testing.assert_close(
        add(slots, "gate_up", 0, x, y, rows), add(oracle, "gate_up", 0, x, y, rows), atol=1e-4, rtol=1e-5
    )


def test_a_slot_s_memory_is_counted_and_freed() -> None:
    slots = new_slots(CpuKernels(1), ARCHITECTURE, 4, "bfloat16")
    adapter = make_adapter(1)
    packed = slots.pack(adapter)
    deltas = [delta for delta in adapter.deltas if isinstance(delta, LowRank)]
    assert packed.num_bytes == 2 * sum(delta.a.numel() + delta.b.numel() for delta in deltas)
    slots.place(1, packed)
    left = weakref.ref(packed.memory)
    del packed
    gc.collect()
    assert left() is not None
    slots.clear(1)
    gc.collect()
    assert left() is None


def test_a_cleared_slot_adds_nothing_and_takes_another_adapter() -> None:
    slots = new_slots(CpuKernels(1), ARCHITECTURE, 4, "float32")
    x, y = inputs(2, "qkv")
    put(slots, 1, make_adapter(1, rank=4))
    first = add(slots, "qkv", 0, x, y, [1, 1])
    slots.clear(1)
    assert torch.equal(add(slots, "qkv", 0, x, y, [1, 1]), y)
    put(slots, 1, make_adapter(2))
    slots.clear(1)
    put(slots, 1, make_adapter(1, rank=4))
    assert torch.equal(add(slots, "qkv", 0, x, y, [1, 1]), first)


def test_an_adapter_that_overflows_spoils_its_own_rows_alone() -> None:
    slots = new_slots(CpuKernels(2), ARCHITECTURE, 4, "float32")
    site = Site(0, "o_proj")
    put(
        slots,
        1,
        LoweredAdapter("a", (LowRank(site, torch.full((1, 96), 1e30), torch.full((64, 1), 1e30), 1.0),)),
    )
    put(slots, 2, make_adapter(2, rank=4))
    x, y = inputs(6, "o")
    actual = add(slots, "o", 0, x, y, [2, 1, 2, 0, 1, 2])
    expected = add(slots, "o", 0, x, y, [2, 0, 2, 0, 0, 2])
    assert torch.equal(actual[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])
    assert not actual[[1, 4]].isfinite().any()


def test_what_cannot_be_run_is_refused() -> None:
    slots = new_slots(CpuKernels(1), ARCHITECTURE, 3, "float32")
    assert isinstance(slots, CpuAdapterSlots)
    delta = make_adapter(1, rank=2).deltas[0]
    with pytest.raises(ModelError, match="one low-rank delta a site"):
        put(slots, 1, LoweredAdapter("twice", (delta, delta)))
    odd = LowRank(Site(0, "q_proj"), torch.zeros(2, 60), torch.zeros(96, 2), 1.0)
    with pytest.raises(ModelError, match="multiples of 8"):
        put(slots, 2, LoweredAdapter("odd", (odd,)))
