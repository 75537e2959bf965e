"""Bottleneck adapters, against their equation as the torch backend's slots hold them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from support.gpu.interpreter import DEVICE  # isort: skip

from manyhats.adapters.activations import ACTIVATIONS
from manyhats.adapters.primitives import Affine, Bottleneck, BottleneckInput, LayerNorm
from manyhats.adapters.sites import Site
from manyhats.engine.backends.cuda.adapters import bottlenecks
from manyhats.engine.backends.cuda.adapters.bottlenecks import NO_NORM, PlacedNorm
from manyhats.engine.backends.cuda.record import StreamNorm
from manyhats.engine.model.architecture import Architecture, Around, Norm
from support.gpu.adapters import Served, normal, odd_architecture, off, sublayer_of
from support.gpu.no_sync import no_sync

HIDDEN = 40
SITE = Site(1, "feed_forward")


def layer_norm(seed: int, hidden_size: int = HIDDEN) -> LayerNorm:
    return LayerNorm(1 + normal(seed, hidden_size), normal(seed + 1, hidden_size), 1e-3)


def adapter(seed: int, size: int, hidden_size: int = HIDDEN, **settings: Any) -> list[Any]:
    values = {
        "input": BottleneckInput.OUTPUT,
        "activation": "silu",
        "scale": torch.tensor([1.5], device=DEVICE),
        **settings,
    }
    return [
        Bottleneck(
            site=SITE,
            down=normal(seed, size, hidden_size),
            down_bias=normal(seed + 1, size),
            up=normal(seed + 2, hidden_size, size),
            up_bias=normal(seed + 3, hidden_size),
            **values,
        )
    ]


PLAIN = [
    adapter(0, 9, norm_before=layer_norm(70)),
    adapter(10, 4, input=BottleneckInput.SUM, activation="gelu", scale=1 + normal(8, HIDDEN)),
    adapter(20, 1, input=BottleneckInput.RESIDUAL, keep=0.5, carry=0.25),
    adapter(30, 33, norm_after=layer_norm(71), norm_residual=BottleneckInput.SUM),
    adapter(40, 3, norm_after=layer_norm(72), norm_before=layer_norm(73), input=BottleneckInput.SUM),
    [Affine(Site(1, "q_proj"), normal(50, 48), None)],
]
"""What AdapterHub's and PEFT's configurations come to on bases without a norm of the stream, and no bottleneck."""

NORMED = [
    adapter(60, 5, input=BottleneckInput.NORMED),
    adapter(62, 6, input=BottleneckInput.NORMED, norm_before=layer_norm(74), carry_normed=1.0, keep=0.0),
    adapter(64, 7, norm_after=layer_norm(75), norm_residual=BottleneckInput.NORMED, carry_normed=0.5),
    adapter(66, 2, skips_norm=True, norm_after=layer_norm(76), norm_residual=BottleneckInput.SUM, keep=0.0),
]


def with_stream_norm(hidden_size: int = HIDDEN) -> Architecture:
    plain = odd_architecture(hidden_size=hidden_size)
    around = Around(stream=Norm(1e-4, kind="layer", has_bias=True))
    return replace(
        plain,
        blocks=tuple(replace(block, around_feed_forward=around) for block in plain.blocks),
    )


def stream_norm(kind: StreamNorm, hidden_size: int = HIDDEN) -> PlacedNorm:
    bias = normal(81, hidden_size) if kind == StreamNorm.LAYER else None
    return PlacedNorm(kind, 1 + normal(80, hidden_size), bias, 1e-4)


def normed(norm: PlacedNorm, x: Tensor) -> Tensor:
    assert norm.weight is not None
    centred = x - x.mean(-1, keepdim=True) if norm.kind == StreamNorm.LAYER else x
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    return y if norm.bias is None else y + norm.bias


def expected(served: Served, row_slots: list[int], r: Tensor, m: Tensor, norm: PlacedNorm) -> Tensor:
    own = None if norm.kind == StreamNorm.NONE else partial(normed, norm)
    return sublayer_of(served, SITE, row_slots, r, m, own)


def changed(
    served: Served, row_slots: list[int], r: Tensor, m: Tensor, norm: PlacedNorm = NO_NORM, slack: int = 0
) -> Tensor:
    step, found = served.step(row_slots, slack=slack), m.clone()
    place, work = served.layout.place(SITE), served.workspace(step.max_rows)
    with no_sync():
        bottlenecks.change_output(step, place, r, found, work, norm)
    return found


def stream(num_rows: int, hidden_size: int = HIDDEN) -> tuple[Tensor, Tensor]:
    return normal(90, num_rows, hidden_size), normal(91, num_rows, hidden_size)


MIXED = [3, 0, 1, 5, *[2] * 17, 6, 4, 1]


def test_each_row_goes_through_its_own_adapters_bottleneck() -> None:
    served = Served(PLAIN)
    r, m = stream(len(MIXED))
    found, right = changed(served, MIXED, r, m), expected(served, MIXED, r, m, NO_NORM)
    for slot in range(1, 6):
        rows = [row for row, own in enumerate(MIXED) if own == slot]
        assert off(found[rows] - m[rows], right[rows] - m[rows]) <= 5e-3, slot
    for row, slot in enumerate(MIXED):
        if slot in (0, 6):
            assert torch.equal(found[row], m[row])


@pytest.mark.parametrize("kind", [StreamNorm.RMS, StreamNorm.LAYER])
def test_a_bottleneck_may_read_and_carry_the_norm_of_the_stream(kind: StreamNorm) -> None:
    served, norm = Served(NORMED, with_stream_norm()), stream_norm(kind)
    row_slots = [1, 2, 0, 3, 4]
    r, m = stream(len(row_slots))
    found, right = changed(served, row_slots, r, m, norm), expected(served, row_slots, r, m, norm)
    for row in (0, 1, 3, 4):
        assert off(found[row] - m[row], right[row] - m[row]) <= 5e-3, row
    assert torch.equal(found[2], m[2])


def test_a_wide_stream_is_read_and_left_in_parts() -> None:
    wide, norm = 1100, stream_norm(StreamNorm.LAYER, 1100)
    own = adapter(
        60,
        20,
        wide,
        input=BottleneckInput.NORMED,
        norm_before=layer_norm(74, wide),
        norm_after=layer_norm(76, wide),
        norm_residual=BottleneckInput.SUM,
        carry_normed=0.5,
    )
    served = Served([own], with_stream_norm(wide))
    r, m = stream(2, wide)
    found, right = changed(served, [0, 1], r, m, norm), expected(served, [0, 1], r, m, norm)
    assert off(found[1] - m[1], right[1] - m[1]) <= 5e-3
    assert torch.equal(found[0], m[0])


def test_a_row_has_the_same_bits_alone_and_in_any_step() -> None:
    served = Served(PLAIN)
    r, m = stream(len(MIXED))
    together = changed(served, MIXED, r, m, slack=3)
    for row in (0, 4, len(MIXED) - 2):
        only = slice(row, row + 1)
        assert torch.equal(changed(served, [MIXED[row]], r[only], m[only]), together[only])


def test_the_norm_of_the_stream_is_skipped_by_those_that_say_so() -> None:
    served = Served(NORMED, with_stream_norm())
    row_slots = [4, 0, 1, 4]
    r, m = stream(len(row_slots))
    behind = normal(92, len(row_slots), HIDDEN)
    found = behind.clone()
    with no_sync():
        bottlenecks.skip_norms(served.step(row_slots, slack=2), served.layout.place(SITE), r, m, found)
    skips = torch.tensor(row_slots, device=DEVICE) == 4
    assert torch.equal(found, torch.where(skips[:, None], r + m, behind))


def test_every_activation_is_known() -> None:
    """One adapter each, all in one step; a bottleneck as wide as the stream shows what goes through it."""
    names = sorted(ACTIVATIONS)
    values = torch.cat(
        (torch.linspace(-30, 30, 16, device=DEVICE), torch.linspace(-3, 3, HIDDEN - 16, device=DEVICE))
    )
    one, zero = torch.eye(HIDDEN, device=DEVICE), torch.zeros(HIDDEN, device=DEVICE)
    served = Served(
        [
            [
                Bottleneck(
                    SITE,
                    BottleneckInput.OUTPUT,
                    one,
                    zero,
                    one,
                    zero,
                    name,
                    torch.ones(1, device=DEVICE),
                    keep=0.0,
                )
            ]
            for name in names
        ]
    )
    row_slots = list(range(1, len(names) + 1))
    m = values.bfloat16().float().repeat(len(names), 1)
    found = changed(served, row_slots, torch.zeros_like(m), m)
    for row, name in enumerate(names):
        right = ACTIVATIONS[name](m[row])
        assert torch.allclose(found[row], right, rtol=2**-8, atol=1e-5), name
