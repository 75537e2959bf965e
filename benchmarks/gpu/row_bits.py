"""Part B: whether a row keeps its bits alone, among others and in every configuration of linears."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.candidates import (
    Candidate,
    Weights,
    dense_candidates,
    families,
    make_weights,
    nf4_candidates,
    num_parts,
    sm_of,
)
from benchmarks.gpu.checks.check import Place
from benchmarks.gpu.checks.mixing import architecture_of
from benchmarks.gpu.paged import AttentionStep, Chunk, Texts, num_lanes_of
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale

_PROBES = 3
"""Rows that are followed."""
_SMALL, _HALVES = (70, 128), (64, 2)
"""Under ``--cpu``: a shape, and how its K is cut."""


def run(out: Recorder, scale: Scale) -> None:
    """Attention, then linears, the larger ones last."""
    device = torch.device(scale.device)
    with out.going_on("attention"):
        _attention(out, scale, device)
    shapes = sorted(set(scale.shape.distinct_linears.values()), key=lambda shape: shape[0] * shape[1])
    for shape in shapes if scale.is_gpu else [_SMALL]:
        if out.is_late:
            return
        with out.going_on(f"linears of {shape}"):
            _linears(out, scale, shape, device)


def _linears(out: Recorder, scale: Scale, shape: tuple[int, int], device: torch.device) -> None:
    sm = sm_of(device)
    weights = make_weights(shape, device, sm)
    flat = make_weights(shape, device, sm, flattens=True, decodes=False)
    x = torch.randn(max(scale.bit_rows), shape[1], device=device).bfloat16()
    for family in families(shape, is_tiny=False) if scale.is_gpu else [_HALVES]:
        candidates = list(nf4_candidates(shape, family, sm, is_tiny=not scale.is_gpu))
        first = candidates[0]
        alone = _alone(weights, first, x)
        for candidate in [*candidates, *dense_candidates(shape, family, sm)]:
            if out.is_late:
                return
            try:
                rows = _wrong_rows(weights, candidate, x, alone, scale.bit_rows)
            except Exception as error:  # noqa: BLE001 - one that a card has no room for is no choice
                out.record("not run", candidate=candidate.key, failure=repr(error))
                continue
            out.record("bits", candidate=candidate.key, holds=not rows, wrong_at=rows)
        of_flat = _alone(flat, first, x)
        out.record("bits of plain absmaxes", shape=list(shape), holds=torch.equal(of_flat, alone))
        if scale.is_gpu and sm == 90:
            # Two warps are too few for Hopper's own instruction.
            other = replace(first, tile=replace(first.tile, num_warps=2))
            same = torch.equal(_alone(weights, other, x), alone)
            out.record("bits of HMMA and HGMMA", shape=list(shape), splits=family[1], holds=same)


def _alone(weights: Weights, candidate: Candidate, x: Tensor) -> Tensor:
    """The first rows, each by itself."""
    return torch.cat([_product(weights, candidate, x[row : row + 1]) for row in range(_PROBES)])


def _product(weights: Weights, candidate: Candidate, x: Tensor) -> Tensor:
    y = torch.full((x.shape[0], candidate.shape[0]), torch.nan, device=x.device)
    parts = torch.full((num_parts(candidate, x.shape[0]),), torch.nan, device=x.device)
    weights.product(candidate, x, y, parts)
    return y


def _wrong_rows(
    weights: Weights, candidate: Candidate, x: Tensor, alone: Tensor, counts: Iterable[int]
) -> list[int]:
    """Numbers of rows, of those that it serves, among which one of the first rows has other bits."""
    wrong = []
    for count in counts:
        if count > candidate.bucket and not candidate.serves(count):
            continue
        # In random places among the others.
        places = random.Random(count).sample(range(count), min(count, _PROBES))
        order = list(range(_PROBES, _PROBES + count))
        for probe, at in enumerate(places):
            order[at] = probe
        among = x[[row % len(x) for row in order]]
        found = _product(weights, candidate, among)
        if not torch.equal(found[places], alone[: len(places)]):
            wrong.append(count)
    return wrong


def _attention(out: Recorder, scale: Scale, device: torch.device) -> None:
    """One text, decoded, as a whole prompt and in chunks, in parts and walked."""
    attention = architecture_of(Place(scale.shape, device, sm_of(device))).attention
    length = 1100 if scale.is_gpu else 40
    texts = Texts.make(attention, [length, length // 2], length, device)
    lanes = num_lanes_of(attention, device)
    whole = AttentionStep(texts, [(0, 0, length)], lanes, 0).run()
    for name, chunks in _ways(length).items():
        for max_slots in (0, 2048):
            found = torch.cat([_of_first(texts, step, lanes, max_slots) for step in chunks])
            holds = torch.equal(found, whole[length - len(found) :])
            out.record(
                "bits of attention", way=name, contexts="in parts" if max_slots else "walked", holds=holds
            )


def _ways(length: int) -> dict[str, list[list[Chunk]]]:
    """Steps that compute the first text's last rows, beside another text or not."""
    third = length // 3
    other: Chunk = (1, length // 2 - 1, length // 2)
    return {
        "decode": [[(0, length - 1, length)]],
        "decode beside another": [[(0, length - 1, length), other]],
        "prefill": [[(0, 0, length)]],
        "chunks": [[(0, 0, third)], [other, (0, third, length - 5)], [(0, length - 5, length)]],
    }


def _of_first(texts: Texts, chunks: Sequence[Chunk], lanes: int, max_slots: int) -> Tensor:
    step = AttentionStep(texts, chunks, lanes, max_slots)
    found, start = step.run(), 0
    for text, first, end in chunks:
        if text == 0:
            return found[start : start + end - first]
        start += end - first
    raise ValueError("the first text has no rows in this step")
