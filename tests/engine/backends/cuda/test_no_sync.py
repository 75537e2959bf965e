"""The guard against waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from support.gpu.no_sync import WaitsForTheDeviceError, may_sync, no_sync

Case = Callable[[Tensor, Tensor], object]


@pytest.mark.parametrize(
    "case",
    [
        lambda x, i: x.sum().item(),
        lambda x, i: bool((x > 0).all()),
        lambda x, i: int(i[0]),
        lambda x, i: i.tolist(),
        lambda x, i: x.numpy(),
        lambda x, i: x.cpu(),
        lambda x, i: torch.nonzero(x),
        lambda x, i: x[x > 0],
        lambda x, i: x[: i[3]],
        lambda x, i: x.repeat_interleave(i, 0),
        lambda x, i: torch.equal(x, x),
    ],
)
def test_what_waits_is_refused(case: Case) -> None:
    x, i = torch.randn(7, 64), torch.arange(7)
    case(x, i)
    with pytest.raises(WaitsForTheDeviceError), no_sync():
        case(x, i)
    case(x, i)


@pytest.mark.parametrize(
    "case",
    [
        lambda x, i: x.index_select(0, i),
        lambda x, i: x.index_put_((i,), x.clone()),
        lambda x, i: x.argmax(-1),
        lambda x, i: x[2:5] + 1.0,
    ],
)
def test_what_does_not_wait_goes_on(case: Case) -> None:
    with no_sync():
        case(torch.randn(7, 64), torch.arange(7))


def test_a_part_may_wait() -> None:
    x = torch.arange(7)
    with no_sync():
        with may_sync():
            assert x.tolist() == list(range(7))
        with pytest.raises(WaitsForTheDeviceError):
            x.tolist()
