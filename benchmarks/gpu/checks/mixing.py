"""K4 to K6, K14: norms, rotation, the cache, attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.checks.check import Check, Place, differing, off
from benchmarks.gpu.model import config_of
from benchmarks.gpu.paged import AttentionStep, Chunk, Texts, num_lanes_of
from manyhats.engine.backends.cuda.attention.cache import CudaKVCache
from manyhats.engine.backends.cuda.attention.rotary import rotate_and_store
from manyhats.engine.backends.cuda.norms import add_norm, norm
from manyhats.engine.backends.torch.rotation import rotated
from manyhats.engine.model.architecture import Architecture, Attention, Norm
from manyhats.engine.model.families.reading import read_family
from manyhats.engine.model.rotary import RotaryTables
from manyhats.engine.model.weights import NormWeight

_ROWS, _BLOCKS, _BLOCK = 5, 4, 16
_EPS = 1e-5


def architecture_of(place: Place) -> Architecture:
    """Of one layer."""
    return read_family(config_of(replace(place.shape, num_layers=1))).architecture


def check_norms(place: Place) -> Iterator[Check]:
    """RMS norm, alone and behind the sum that it reads."""
    size = place.shape.hidden_size
    stream, delta = place.normal(1, _ROWS, size), place.normal(2, _ROWS, size)
    weight = NormWeight(place.normal(3, size))

    def exact(x: Tensor) -> Tensor:
        return functional.rms_norm(x.double(), (size,), weight.weight.double(), _EPS)

    out, summed = place.poisoned(_ROWS, size), stream.clone()
    norm(stream, Norm(_EPS), weight, out)
    yield Check("K4 norm", off(out, exact(stream)), 2e-6)
    out = place.poisoned(_ROWS, size)
    add_norm(summed, delta, 0.5, Norm(_EPS), weight, out)
    yield Check("K4 add_norm", off(out, exact(stream.double() + 0.5 * delta.double())), 2e-6)
    yield Check("K4 add_norm, the sum", off(summed, stream.double() + 0.5 * delta.double()), 1e-6)


def check_rotation(place: Place) -> Iterator[Check]:
    """Rotated queries, and keys and values in their cells."""
    architecture = architecture_of(place)
    attention = architecture.attention
    heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_dim
    cos, sin = (part.to(place.device) for part in RotaryTables(architecture).tables[attention.rope])
    positions = torch.tensor([3, 0, 7, 100, 8], dtype=torch.int32, device=place.device)
    cells = torch.tensor([17, 2, 40, 63, 9], device=place.device)
    qkv = place.normal(4, _ROWS, (heads + 2 * kv_heads) * size)
    queries = place.poisoned(_ROWS, heads, size, dtype=torch.bfloat16)
    keys, values = (place.poisoned(_BLOCKS, _BLOCK, kv_heads, size, dtype=torch.bfloat16) for _ in "kv")
    rotate_and_store(qkv, attention, (cos, sin), positions, cells, None, None, queries, keys, values)
    q, k, v = (
        each.unflatten(1, (-1, size))
        for each in qkv.split((heads * size, kv_heads * size, kv_heads * size), 1)
    )
    angles = cos[positions].double(), sin[positions].double()
    rounding = 2**-8
    yield Check("K5 rotate, queries", off(queries, rotated(q.double(), angles)), rounding)
    yield Check("K5 rotate, keys", off(keys.flatten(0, 1)[cells], rotated(k.double(), angles)), rounding)
    yield Check("K5 store, values", differing(values.flatten(0, 1)[cells], v.bfloat16()), 0.0)
    yield Check("K5 store, other cells", abs(float(values.isnan().double().mean()) - 1 + _ROWS / 64), 0.0)


def check_attention(place: Place) -> Iterator[Check]:
    """A decode, a prompt and a chunk together; with a window and a cap; with contexts in parts."""
    plain = architecture_of(place).attention
    for name, attention in {
        "plain": plain,
        "window and cap": replace(plain, window=21, softcap=3.0),
    }.items():
        texts = Texts.make(attention, [300, 19, 40], 40, place.device)
        chunks: list[Chunk] = [(0, 299, 300), (1, 0, 19), (2, 30, 40)]
        expected = torch.cat([_exact(texts, chunk) for chunk in chunks])
        for way, max_slots in (("split", 2048), ("walked", 0)):
            step = AttentionStep(texts, chunks, num_lanes_of(attention, place.device), max_slots)
            yield Check(f"K6 attend, {name}, {way}", off(step.run(), expected), 4e-3)


def _exact(texts: Texts, chunk: Chunk) -> Tensor:
    """In float64: [rows, H, K]."""
    text, first, end = chunk
    attention = texts.attention
    group = attention.num_heads // attention.num_kv_heads
    keys, values = (part.double().repeat_interleave(group, 1) for part in texts.context(text, end))
    scores = torch.einsum("qhd,khd->hqk", texts.rows(chunk).double(), keys) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    return torch.einsum("hqk,khd->qhd", _softmax(scores, attention, first), values)


def _softmax(scores: Tensor, attention: Attention, first: int) -> Tensor:
    positions = torch.arange(scores.shape[2], device=scores.device)
    rows = first + torch.arange(scores.shape[1], device=scores.device)[:, None]
    is_seen = positions <= rows
    if attention.window is not None:
        is_seen &= positions > rows - attention.window
    return scores.masked_fill(~is_seen, -torch.inf).softmax(-1)


def check_cache(place: Place) -> Iterator[Check]:
    """Copies of blocks, and what is written from outside."""
    architecture = architecture_of(place)
    cache = CudaKVCache(architecture, _BLOCKS, _BLOCK, place.device)
    size = cache.keys.shape
    cache.keys.copy_(place.normal(5, *size))
    cache.values.copy_(place.normal(6, *size))
    before = cache.keys.clone()
    copies = torch.tensor([[0, 3], [2, 1], [0, 2]], dtype=torch.int32, device=place.device)
    cache.copy_blocks(copies, torch.tensor([2], dtype=torch.int32, device=place.device), 2)
    expected = before[:, [0, 2, 2, 0, 4]]
    yield Check("K14 copy_blocks", differing(cache.keys, expected), 0.0)
    keys, values = (place.normal(seed, size[0], 20, *size[3:]) for seed in (7, 8))
    cache.write([3, 1], keys, values)
    written = cache.values[:, [3, 1]].flatten(1, 2)[:, :20]
    yield Check("K14 write", differing(written, values.bfloat16()), 0.0)
