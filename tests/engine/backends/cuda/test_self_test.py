"""What is seen of a GPU's linears before the first request, and that a wrong one is refused."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

from typing import Any

import pytest
import torch
from torch import Tensor

from manyhats.engine.backends.cuda import self_test
from manyhats.engine.backends.cuda.experts.linear import ExpertLinears, expert_linear, pack_experts
from manyhats.engine.backends.cuda.experts.routing import SortedPairs
from manyhats.engine.backends.cuda.linears.linear import CudaLinear, LinearWorkspace, linear
from manyhats.engine.backends.cuda.linears.packing import pack_linear
from manyhats.engine.backends.cuda.linears.tiles import RowTiles
from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import quantize_nf4
from manyhats.engine.model.weights import Linear

MAX_ROWS = 40


@pytest.fixture(scope="module", params=["dense", "nf4"])
def weights(request: pytest.FixtureRequest) -> CudaLinear:
    matrix = torch.randn(70, 128, generator=torch.Generator().manual_seed(1))
    given = Linear(matrix if request.param == "dense" else quantize_nf4(matrix), torch.randn(70))
    return pack_linear("one", [given], 90, torch.device(DEVICE))


def check(weights: CudaLinear) -> None:
    workspace = LinearWorkspace.of([weights], MAX_ROWS, torch.device(DEVICE))
    self_test.check_linears([weights, weights], workspace, MAX_ROWS)


def spoiled(monkeypatch: pytest.MonkeyPatch, more: Any) -> None:
    def product(x: Tensor, weights: CudaLinear, y: Tensor, workspace: LinearWorkspace) -> None:
        linear(x, weights, y, workspace)
        y.mul_(more(x.shape[0]))

    monkeypatch.setattr(self_test, "linear", product)


def test_linears_that_keep_their_rows_bits_pass(weights: CudaLinear) -> None:
    check(weights)


def test_a_wrong_product_is_refused(weights: CudaLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch, lambda num_rows: 1.1)
    with pytest.raises(ModelError, match="128 inputs and 70 outputs; give --invariance fast"):
        check(weights)


@pytest.mark.parametrize("num_rows", [20, 32, MAX_ROWS])
def test_a_row_that_depends_on_its_company_is_refused(
    weights: CudaLinear, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    spoiled(monkeypatch, lambda found: 1.0 + 2**-20 * (found == num_rows))
    with pytest.raises(ModelError, match=f"with {num_rows} rows; give --invariance fast"):
        check(weights)


@pytest.fixture(scope="module", params=["dense", "nf4"])
def experts(request: pytest.FixtureRequest) -> ExpertLinears:
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(70, 128, generator=generator) for _ in range(3)]
    own = [Linear(each if request.param == "dense" else quantize_nf4(each)) for each in matrices]
    return pack_experts("experts", [[each] for each in own], 90, torch.device(DEVICE))


def spoiled_experts(monkeypatch: pytest.MonkeyPatch, factor: float, num_rows: int) -> None:
    def product(x: Tensor, experts: ExpertLinears, pairs: SortedPairs, y: Tensor, tile: RowTiles) -> None:
        expert_linear(x, experts, pairs, y, tile)
        if tile.rows == num_rows:
            y.mul_(factor)

    monkeypatch.setattr(self_test, "expert_linear", product)


def test_experts_that_keep_their_rows_bits_pass(experts: ExpertLinears) -> None:
    self_test.check_experts([experts, experts], MAX_ROWS)


def test_a_wrong_product_of_an_expert_is_refused(
    experts: ExpertLinears, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled_experts(monkeypatch, 1.1, num_rows=16)
    with pytest.raises(ModelError, match="128 inputs and 70 outputs; give --invariance fast"):
        self_test.check_experts([experts], MAX_ROWS)


@pytest.mark.parametrize("num_rows", [32, 128])
def test_an_experts_row_that_depends_on_its_tile_is_refused(
    experts: ExpertLinears, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    spoiled_experts(monkeypatch, 1.0 + 2**-20, num_rows)
    with pytest.raises(ModelError, match=f"with {num_rows} rows; give --invariance fast"):
        self_test.check_experts([experts], MAX_ROWS)
