"""Adapters at linears, against the equations as the torch backend's slots hold them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.gpu.interpreter import DEVICE  # isort: skip

from manyhats.adapters.primitives import Affine, Delta, InputScale, LowRank
from manyhats.adapters.sites import Site
from manyhats.engine.backends.cuda.adapters import deltas
from manyhats.engine.backends.cuda.adapters.step import StepAdapters, split_of
from support.gpu.adapters import Served, normal, odd_architecture, off, outputs_of
from support.gpu.compiling import faults_of
from support.gpu.no_sync import no_sync

QKV = {"q_proj": 48, "k_proj": 24, "v_proj": 24}
HIDDEN, WIDTH = 40, 72
LAYER = 1


def low_rank(name: str, rank: int, seed: int, *, d_in: int = HIDDEN, d_out: int | None = None) -> LowRank:
    size = d_out or QKV[name]
    return LowRank(Site(LAYER, name), normal(seed, rank, d_in), normal(seed + 1, size, rank), 0.3 + seed / 64)


def affine(name: str, seed: int, *, scaled: bool = True, shifted: bool = True) -> Affine:
    scale, offset = (normal(seed + part, QKV[name]) for part in range(2))
    return Affine(Site(LAYER, name), scale if scaled else None, offset if shifted else None)


ADAPTERS: list[list[Delta]] = [
    [low_rank(name, 16, seed) for seed, name in enumerate(QKV)],
    [affine("v_proj", 14), low_rank("q_proj", 3, 10), low_rank("v_proj", 37, 12)],
    [affine("q_proj", 20, shifted=False), affine("k_proj", 22, scaled=False)],
    [Affine(Site(0, "k_proj"), normal(30, 24), None)],
]
"""All three linears, some of unequal ranks, one rescaled as well; no rank; nothing in this layer."""


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(ADAPTERS)


def expected(served: Served, row_slots: list[int], x: Tensor, y: Tensor, group: str = "qkv") -> Tensor:
    return outputs_of(served, LAYER, group, row_slots, x, y)


def changed(served: Served, step: StepAdapters, x: Tensor, y: Tensor, group: str = "qkv") -> Tensor:
    found = y.clone()
    work = served.workspace(step.max_rows)
    with no_sync():
        deltas.change_outputs(step, served.layout.group(LAYER, group), x, found, work)
    return found


def inputs(num_rows: int, d_in: int = HIDDEN, d_out: int = 96) -> tuple[Tensor, Tensor]:
    return normal(91, num_rows, d_in).bfloat16(), normal(92, num_rows, d_out)


MIXED = [0, 2, 1, *[1] * 17, 3, 0, 4, 2]


def test_each_row_gets_its_own_adapters_deltas(served: Served) -> None:
    x, y = inputs(len(MIXED))
    found, right = changed(served, served.step(MIXED), x, y), expected(served, MIXED, x, y)
    assert off(found - y, right - y) <= 3e-3
    rescaled = [row for row, slot in enumerate(MIXED) if slot == 3]
    assert off(found[rescaled], right[rescaled]) <= 1e-6, "without a low rank nothing is rounded"


def test_rows_without_an_adapter_at_a_linear_keep_their_bits(served: Served) -> None:
    x, y = inputs(len(MIXED))
    found = changed(served, served.step(MIXED), x, y)
    for row, slot in enumerate(MIXED):
        if slot in (0, 4):
            assert torch.equal(found[row], y[row])
        if slot == 2:
            assert torch.equal(found[row, 48:72], y[row, 48:72]), "its k_proj"


@settings(max_examples=6, deadline=None)
@given(row_slots=st.lists(st.integers(0, 4), min_size=1, max_size=8), slack=st.integers(1, 3))
def test_a_row_has_the_same_bits_alone_and_in_any_step(
    served: Served, row_slots: list[int], slack: int
) -> None:
    x, y = inputs(len(row_slots))
    together = changed(served, served.step(row_slots, slack=slack), x, y)
    row = len(row_slots) // 2
    only = slice(row, row + 1)
    assert torch.equal(changed(served, served.step([row_slots[row]]), x[only], y[only]), together[only])


def test_what_lies_beyond_the_counts_is_not_read(served: Served) -> None:
    x, y = inputs(len(MIXED))
    assert torch.equal(
        changed(served, served.step(MIXED, slack=4), x, y), changed(served, served.step(MIXED), x, y)
    )


def test_outputs_in_bfloat16_are_rounded_once(served: Served) -> None:
    x, y = inputs(len(MIXED))
    found = changed(served, served.step(MIXED), x, y.bfloat16())
    assert torch.equal(found, changed(served, served.step(MIXED), x, y.bfloat16().float()).bfloat16())


def test_wide_outputs_are_changed_in_parts() -> None:
    wide = 1100
    delta = low_rank("down_proj", 20, 40, d_in=WIDTH, d_out=wide)
    rescaled = Affine(delta.site, normal(42, wide), normal(43, wide))
    served = Served([[delta, rescaled]], odd_architecture(hidden_size=wide))
    x, y = inputs(2, WIDTH, wide)
    found, right = (
        changed(served, served.step([0, 1]), x, y, "down"),
        expected(served, [0, 1], x, y, "down"),
    )
    assert off(found - y, right - y) <= 3e-3
    assert torch.equal(found[0], y[0])


def test_a_long_sum_is_cut_into_ranges_that_are_added_in_order() -> None:
    d_in = 1100
    assert split_of(d_in) == (2, 1024)
    served = Served([[low_rank("down_proj", 20, 40, d_in=d_in, d_out=HIDDEN)]], odd_architecture(width=d_in))
    x, y = inputs(2, d_in, HIDDEN)
    found = changed(served, served.step([1, 0]), x, y, "down")
    assert off(found - y, expected(served, [1, 0], x, y, "down") - y) <= 3e-3


@pytest.mark.parametrize("num_inputs", [16, 1024, 4096, 8192, 14336, 28672])
def test_ranges_cover_the_inputs_in_whole_tiles(num_inputs: int) -> None:
    count, size = split_of(num_inputs)
    assert count <= 8
    assert (count - 1) * size < num_inputs <= count * size
    assert size % 128 == 0


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 72), (torch.bfloat16, 72), (torch.bfloat16, 1100)]
)
def test_inputs_are_rescaled_in_place(dtype: torch.dtype, width: int) -> None:
    scale = 1 + normal(50, width)
    served = Served(
        [[low_rank("q_proj", 4, 51)], [InputScale(Site(LAYER, "down_proj"), scale)]],
        odd_architecture(width=width),
    )
    row_slots = [2, 0, 1, *[2] * 16]
    x = normal(52, len(row_slots), width).to(dtype)
    found = x.clone()
    with no_sync():
        deltas.scale_inputs(served.step(row_slots, slack=2), served.layout.group(LAYER, "down"), found)
    own = torch.tensor(row_slots, device=DEVICE) == 2
    assert torch.equal(found, torch.where(own[:, None], (x.float() * scale).to(dtype), x))


def test_a_step_of_base_rows_launches_nothing(served: Served) -> None:
    x, y = inputs(3)
    assert torch.equal(changed(served, served.step([0, 0, 0]), x, y), y)


def test_the_kernels_of_adapters_compile() -> None:
    assert faults_of("support.gpu.entries.adapters") == []
