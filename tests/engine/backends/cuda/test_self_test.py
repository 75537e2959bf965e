"""What is seen of a GPU's linears before the first request, and that a wrong one is refused."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

from typing import Any

import pytest
import torch
from torch import Tensor

from manyhats.engine.backends.cuda import self_test
from manyhats.engine.backends.cuda.linear import CudaLinear, LinearWorkspace, linear
from manyhats.engine.backends.cuda.linear_packing import pack_linear
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
