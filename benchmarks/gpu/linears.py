"""Part C: how fast linears are, by configuration, beside bitsandbytes and beside decoding first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.candidates import (
    Candidate,
    Shape,
    Weights,
    dense_candidates,
    families,
    make_weights,
    nf4_candidates,
    num_parts,
    sm_of,
)
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import Timed, Timer
from manyhats.engine.backends.cuda.linears.dense import DenseLinear, dense_linear
from manyhats.engine.backends.cuda.linears.nf4 import nf4_dequantize
from manyhats.engine.backends.cuda.linears.tiles import tiles_for
from manyhats.engine.model.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, Nf4Weight

_FEW_CALLS, _MANY_ROWS = 3, 512
"""Products that are timed together, from so many rows on."""
_MOST_COPIES = 64
_FEW_ROWS = (1, 16, 64)
"""Numbers of rows for which K is also cut in other ways than the default."""


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What is timed on.

    Attributes:
        calls: products that are timed together.
        copies: weights of one shape, together larger than a cache.
        flat: the same with plain absmaxes.
        ceilings: bytes, and operations, that the card does in a second; None if part 0 did not tell.
    """

    out: Recorder
    timer: Timer
    calls: int
    shape: Shape
    copies: list[Weights]
    flat: list[Weights]
    ceilings: tuple[float | None, float | None]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.copies[0].dense.weight.device

    def in_turn(self, rows: int, weights: list[Weights] | None = None) -> Iterator[Weights]:
        """The weights, one after another, as often as they are timed."""
        chosen = weights or self.copies
        count = min(_FEW_CALLS, self.calls) if rows >= _MANY_ROWS else max(self.calls, len(chosen))
        return islice(cycle(chosen), count)

    def record(self, what: str, rows: int, timed: Timed, num_bytes: int, **figures: Any) -> None:
        """Keep a time, with rates and how near the ceilings they are."""
        n, k = self.shape
        moved, flops = num_bytes + rows * (2 * k + 4 * n), 2 * rows * n * k
        of = [
            None if ceiling is None else amount / timed.seconds / ceiling
            for amount, ceiling in zip((moved, flops), self.ceilings, strict=True)
        ]
        self.out.record(
            what,
            shape=list(self.shape),
            rows=rows,
            us=1e6 * timed.seconds,
            gb_per_s=moved / timed.seconds / 1e9,
            tflop_per_s=flops / timed.seconds / 1e12,
            of_copy=of[0],
            of_product=of[1],
            is_graph=timed.is_graph,
            **figures,
        )


def run(out: Recorder, scale: Scale) -> None:
    """The engine's shapes first, and of each the peers beside our own."""
    device = torch.device(scale.device)
    peers = _Peers.found(out)
    shapes = list(scale.shape.distinct_linears.values())
    for shape in shapes if scale.is_gpu else shapes[:1]:
        bench = _bench(out, scale, shape, device)
        for rows in scale.linear_rows:
            if out.is_late:
                return
            with out.going_on(f"{shape} with {rows} rows"):
                _time_peers(bench, peers, rows)
                _time_own(bench, scale, rows, device)
    _time_head(out, scale, device)


def _bench(out: Recorder, scale: Scale, shape: Shape, device: torch.device) -> Bench:
    size = shape[0] * shape[1] // 2
    count = max(1, min(_MOST_COPIES, -(-scale.rotated_bytes // size)))
    sm = sm_of(device)
    copies = [make_weights(shape, device, sm, seed=seed, decodes=seed == 0) for seed in range(count)]
    flat = [make_weights(shape, device, sm, seed=seed, flattens=True, decodes=False) for seed in range(count)]
    ceilings = out.earlier("0")
    copy, product = ceilings.first("copy", "gb_per_s"), ceilings.first("product", "tflop_per_s")
    return Bench(
        out,
        Timer(device, scale.repeats),
        scale.calls,
        shape,
        copies,
        flat,
        (None if copy is None else 1e9 * copy, None if product is None else 1e12 * product),
    )


def _time_own(bench: Bench, scale: Scale, rows: int, device: torch.device) -> None:
    """Every candidate of the usual way to cut K; of the other ways those tiles that were the fastest there."""
    x, y = _inputs(bench.shape, rows, device)
    sm, is_tiny = sm_of(device), not scale.is_gpu
    usual, *others = families(bench.shape, is_tiny=is_tiny)
    candidates = [
        each for each in nf4_candidates(bench.shape, usual, sm, is_tiny=is_tiny) if each.serves(rows)
    ]
    times: dict[Candidate, float] = {}
    for candidate in candidates:
        if bench.out.is_late:
            return
        times[candidate] = _time(bench, candidate, x, y, bench.copies, "nested")
        _time(bench, candidate, x, y, bench.flat, "plain")
    for family in others:
        there = {each.tile for each in nf4_candidates(bench.shape, family, sm, is_tiny=is_tiny)}
        fastest = sorted((each for each in times if each.tile in there), key=times.__getitem__)
        for candidate in fastest[:_BEST]:
            cut = replace(candidate, block_k=family[0], splits=family[1])
            _time(bench, cut, x, y, bench.copies, "nested")
    if rows >= _DECODING_FROM:
        for family in (usual, *others):
            decoded = next(each for each in dense_candidates(bench.shape, family, sm) if each.serves(rows))
            _time_decoded_first(bench, decoded, x, y)


_BEST = 2
_DECODING_FROM = 128
"""Rows from which decoding weights first may pay."""


def _inputs(shape: Shape, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, shape[1], device=device).bfloat16()
    return x, torch.empty(rows, shape[0], device=device)


def _time(
    bench: Bench, candidate: Candidate, x: Tensor, y: Tensor, weights: list[Weights], absmax: str
) -> float:
    """Seconds; infinitely many if it cannot run."""
    rows = len(x)
    parts = torch.empty(num_parts(candidate, rows), device=x.device)
    try:
        timed = bench.timer.time(
            [partial(each.product, candidate, x, y, parts) for each in bench.in_turn(rows, weights)]
        )
    except Exception as error:  # noqa: BLE001 - one that a card cannot run is no choice; the others go on
        bench.out.record("not run", candidate=candidate.key, rows=rows, failure=repr(error))
        return math.inf
    num_bytes = weights[0].nf4.num_bytes
    bench.record("nf4", rows, timed, num_bytes, absmax=absmax, candidate=candidate.key)
    return timed.seconds


def _time_decoded_first(bench: Bench, candidate: Candidate, x: Tensor, y: Tensor) -> None:
    rows, dense = len(x), bench.copies[0].dense
    parts = torch.empty(num_parts(candidate, rows), device=x.device)

    def both(weights: Weights) -> None:
        nf4_dequantize(weights.nf4, dense.weight)
        replace(weights, dense=dense).product(candidate, x, y, parts)

    timed = bench.timer.time([partial(both, each) for each in bench.in_turn(rows)])
    num_bytes = bench.copies[0].nf4.num_bytes + 2 * dense.weight.nbytes
    bench.record("decoded first", rows, timed, num_bytes, candidate=candidate.key)


@dataclass(frozen=True, slots=True)
class _Peers:
    """bitsandbytes; None where it is not installed."""

    functional: Any

    @classmethod
    def found(cls, out: Recorder) -> _Peers:
        try:
            return cls(import_module("bitsandbytes.functional"))
        except ImportError as error:
            out.lacks(f"gemm_4bit, and dequantizing before a product: {error}")
            return cls(None)

    def calls(self, matrix: Nf4Weight, x: Tensor) -> dict[str, Callable[[], object]]:
        """Its ways to multiply a matrix, whose statistics are made ready now."""
        state = quant_state(self.functional, matrix)
        packed = matrix.packed.view(-1, 1)
        return {
            "gemm_4bit": partial(gemm_4bit, x, matrix, state.offset),
            "dequantize + mm": lambda: functional.linear(x, self.functional.dequantize_4bit(packed, state)),
        }


def _time_peers(bench: Bench, peers: _Peers, rows: int) -> None:
    if peers.functional is None:
        return
    x, _ = _inputs(bench.shape, rows, bench.device)
    of_each = [peers.calls(weights.matrix, x) for weights in bench.copies]
    for what in of_each[0]:
        calls = [calls[what] for calls in of_each]
        count = len(list(bench.in_turn(rows)))
        try:
            timed = bench.timer.time(list(islice(cycle(calls), count)))
        except Exception as error:  # noqa: BLE001 - a peer that cannot run is named; the others go on
            bench.out.lacks(f"{what} of {bench.shape} with {rows} rows: {error!r}")
            continue
        bench.record(what, rows, timed, bench.copies[0].matrix.num_bytes)


def gemm_4bit(x: Tensor, matrix: Nf4Weight, offset: Tensor) -> Tensor:
    """bitsandbytes' fused product, which takes both levels of absmaxes; the offset lies on the device."""
    y: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        x,
        matrix.packed,
        list(matrix.shape),
        matrix.nested_absmax,
        BLOCK_SIZE,
        "nf4",
        None,
        matrix.absmax,
        matrix.nested_code,
        offset,
    )
    return y


def quant_state(functions: Any, matrix: Nf4Weight) -> Any:
    """A matrix's statistics as ``bitsandbytes.functional`` has them."""
    nested = functions.QuantState(
        absmax=matrix.nested_absmax, blocksize=NESTED_BLOCK_SIZE, code=matrix.nested_code, dtype=torch.float32
    )
    return functions.QuantState(
        absmax=matrix.absmax,
        shape=torch.Size(matrix.shape),
        code=matrix.code,
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.tensor(matrix.offset, device=matrix.packed.device),
        state2=nested,
    )


def _time_head(out: Recorder, scale: Scale, device: torch.device) -> None:
    """The output head, in bfloat16, beside torch's product."""
    n, k = scale.shape.vocab_size, scale.shape.hidden_size
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    linear = DenseLinear(weight, None, tiles_for(sm_of(device), n, k))
    timer = Timer(device, scale.repeats)
    for rows in scale.linear_rows:
        if rows > _FEW_ROWS[-1] or out.is_late:
            return
        x, y = _inputs((n, k), rows, device)
        parts = torch.empty(linear.tiles.splits * linear.tiles.num_partial_rows(rows) * n, device=device)
        ways: dict[str, Callable[[], object]] = {
            "own": partial(dense_linear, x, linear, y, parts),
            "torch": partial(functional.linear, x, weight),
        }
        for by, call in ways.items():
            timed = timer.time([call] * min(_FEW_CALLS, scale.calls))
            gb_per_s = weight.nbytes / timed.seconds / 1e9
            out.record("head", by=by, shape=[n, k], rows=rows, us=1e6 * timed.seconds, gb_per_s=gb_per_s)
