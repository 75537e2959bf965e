"""K1 to K3, K11: linears, activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu.candidates import Candidate, make_weights, num_parts
from benchmarks.gpu.checks.check import Check, Place, differing, off
from benchmarks.gpu.model import random_nf4
from manyhats.adapters.activations import ACTIVATIONS
from manyhats.engine.backends.cuda.activations import activate, scale_logits
from manyhats.engine.backends.cuda.linears.nf4 import Nf4Linear, nf4_dequantize
from manyhats.engine.backends.cuda.linears.packing import pack_linear
from manyhats.engine.backends.cuda.linears.tiles import RowTiles
from manyhats.engine.model.architecture import FeedForward, Head
from manyhats.engine.model.forward import scaled_logits
from manyhats.engine.model.weights import Linear

_ROWS = 5
_ROUNDED, _CUT_OFF = 1e-6, 3e-5
"""What sums in float32 may be off: the interpreter rounds each; tensor cores cut off what they add to."""


def check_linears(place: Place) -> Iterator[Check]:
    """Products of few rows, split, walked and dense, and the weights by themselves."""
    rows, columns = place.shape.linears["o"]
    shape = (rows, max(columns, 128))  # of two ranges, at least
    weights = make_weights(shape, place.device, place.sm)
    x = place.normal(1, _ROWS, shape[1]).bfloat16()
    exact = x.double() @ weights.dense.weight.double().T
    for name, candidate in _ways(shape).items():
        y = place.poisoned(_ROWS, shape[0])
        parts = place.poisoned(num_parts(candidate, _ROWS))
        weights.product(candidate, x, y, parts)
        yield Check(name, off(y, exact), _ROUNDED if place.device.type == "cpu" else _CUT_OFF)
        if parts.numel():
            summed = parts.view(candidate.splits, _ROWS, shape[0])
            in_order = summed[0]
            for each in summed[1:]:
                in_order = in_order + each
            yield Check("K1r reduce_splits", differing(y, in_order), 0.0)


def _ways(shape: tuple[int, int]) -> dict[str, Candidate]:
    split = Candidate(shape, 64, 2, 16, RowTiles(16, 64, 4, 3, is_split=True))
    walked = replace(split, tile=RowTiles(32, 64, 4, 3))
    return {
        "K1 nf4_linear, split": split,
        "K1 nf4_linear, walked": walked,
        "K1 nf4_linear, codes from memory": replace(walked, tile=RowTiles(16, 64, 4, 1, gathers=False)),
        "K3 dense_linear": replace(walked, is_dense=True),
    }


def check_dequantized(place: Place) -> Iterator[Check]:
    """Weights decoded, of both kinds of absmaxes, bit by bit."""
    generator = torch.Generator(place.device).manual_seed(2)
    for is_nested in (True, False):
        matrix = random_nf4(*place.shape.linears["k"], generator, is_nested=is_nested)
        packed = pack_linear("checked", [Linear(matrix)], place.sm, place.device)
        assert isinstance(packed, Nf4Linear)
        found = place.poisoned(*matrix.shape, dtype=torch.bfloat16)
        nf4_dequantize(packed, found)
        kind = "nested" if is_nested else "plain"
        yield Check(f"K2 nf4_dequantize, {kind}", differing(found, matrix.dequantize().bfloat16()), 0.0)


def check_activations(place: Place) -> Iterator[Check]:
    """Gates and caps."""
    width = place.shape.intermediate_size
    x = place.normal(3, _ROWS, 2 * width)
    for name in ("silu", "gelu_pytorch_tanh"):
        out = place.poisoned(_ROWS, width)
        activate(x, FeedForward(width, name), out)
        gate, up = x.double().chunk(2, dim=1)
        yield Check(f"K11 activate, {name}", off(out, ACTIVATIONS[name](gate) * up), 2e-6)
    head = Head(is_tied=False, size=1, divisor=2.0, softcap=30.0)
    logits = place.normal(4, _ROWS, place.shape.vocab_size, scale=20.0)
    expected = scaled_logits(logits.double(), head)
    scale_logits(logits, head)
    yield Check("K11 scale_logits", off(logits, expected), 2e-6)
