"""Inputs that adapters rescale for some of the linears which read them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.gpu.interpreter import DEVICE  # isort: skip

from manyhats.adapters.primitives import Delta, InputScale, LowRank
from manyhats.adapters.sites import Site
from manyhats.engine.backends.cuda.adapters import scaling
from manyhats.engine.backends.cuda.adapters.deltas import change_outputs, scale_inputs
from manyhats.engine.backends.cuda.linears.linear import CudaLinear, LinearWorkspace, linear
from manyhats.engine.backends.cuda.linears.packing import pack_linear
from manyhats.engine.model.weights import Linear
from support.gpu.adapters import Served, normal, off, outputs_of
from support.gpu.linears import poisoned, rounded
from support.gpu.no_sync import no_sync

HIDDEN, LAYER = 40, 1
SIZES = {"q_proj": 48, "k_proj": 24, "v_proj": 24}
LINEARS = [
    Linear(normal(seed, size, HIDDEN).cpu(), normal(seed + 9, size).cpu() if seed == 1 else None)
    for seed, size in enumerate(SIZES.values())
]


def scale_of(name: str, seed: int) -> InputScale:
    return InputScale(Site(LAYER, name), 1 + normal(seed, HIDDEN))


def low_rank(name: str, seed: int) -> LowRank:
    return LowRank(Site(LAYER, name), normal(seed, 4, HIDDEN), normal(seed + 1, SIZES[name], 4), 0.5)


SAME = scale_of("q_proj", 20)
ADAPTERS: list[list[Delta]] = [
    [scale_of("k_proj", 10)],
    [scale_of("q_proj", 11), scale_of("v_proj", 12), low_rank("k_proj", 13)],
    [InputScale(Site(LAYER, name), SAME.scale) for name in SIZES],
    [low_rank("q_proj", 15)],
]
"""One linear of three; two, each by factors of its own, beside a delta of the third; all alike; none."""
ROW_SLOTS = [2, 0, 1, *[2] * 5, 3, 4, 1]


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(ADAPTERS)


@pytest.fixture(scope="module")
def weights() -> CudaLinear:
    return pack_linear("qkv", LINEARS, 80, torch.device(DEVICE))


def run(served: Served, weights: CudaLinear, row_slots: list[int], x: Tensor, slack: int = 0) -> Tensor:
    step, place, work = (
        served.step(row_slots, slack=slack),
        served.layout.group(LAYER, "qkv"),
        served.workspace(16),
    )
    y, x = poisoned(len(row_slots), weights.out_features), x.clone()
    products = LinearWorkspace.of([weights], 16, torch.device(DEVICE))
    with no_sync():
        scale_inputs(step, place, x)
        linear(x, weights, y, products)
        scaling.rescale_members(step, place, x, weights, y, work, products)
        change_outputs(step, place, x, y, work)
    return y


def expected(served: Served, row_slots: list[int], x: Tensor) -> Tensor:
    """One row and one linear at a time, of inputs rounded to bfloat16."""
    found = torch.empty(len(row_slots), sum(SIZES.values()), dtype=torch.float64)
    for row, slot in enumerate(row_slots):
        parts = []
        for name, own in zip(SIZES, LINEARS, strict=True):
            inputs = x[row].cpu()
            for delta in served.torch[slot].at(Site(LAYER, name), InputScale) if slot else ():
                inputs = (inputs.float() * delta.scale.cpu()).bfloat16()
            product = rounded(own).double() @ inputs.double()
            parts.append(product if own.bias is None else product + own.bias.double())
        found[row] = torch.cat(parts)
    return outputs_of(served, LAYER, "qkv", row_slots, x, found.to(DEVICE))


@pytest.mark.parametrize("rows_at_a_time", [256, 4])
def test_each_linear_reads_what_its_rows_adapters_make_of_the_input(
    served: Served, weights: CudaLinear, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "SCALED_ROWS", rows_at_a_time)
    x = normal(1, len(ROW_SLOTS), HIDDEN).bfloat16()
    found, right = run(served, weights, ROW_SLOTS, x), expected(served, ROW_SLOTS, x)
    for row, slot in enumerate(ROW_SLOTS):
        assert off(found[row], right[row]) <= (3e-3 if slot in (2, 4) else 1e-6), (row, slot)


def test_a_row_has_the_same_bits_alone_and_in_any_step(served: Served, weights: CudaLinear) -> None:
    x = normal(1, len(ROW_SLOTS), HIDDEN).bfloat16()
    together = run(served, weights, ROW_SLOTS, x, slack=3)
    for row in (0, 1, 2, 8):
        only = slice(row, row + 1)
        assert torch.equal(run(served, weights, [ROW_SLOTS[row]], x[only]), together[only])
