"""The cache of keys and values, as the torch backend's."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.engine.backends.cuda.attention.cache import CudaKVCache
from manyhats.engine.backends.torch.cache import TorchKVCache
from manyhats.engine.model.architecture import Architecture
from support.factories.architectures import make_architecture, make_attention
from support.gpu.compiling import faults_of

NUM_BLOCKS, BLOCK = 6, 4


def architecture(kv_heads: int = 3, size: int = 20, num_layers: int = 2) -> Architecture:
    return make_architecture(make_attention(kv_heads, kv_heads, size), num_layers=num_layers)


def new_cache(of: Architecture) -> CudaKVCache:
    return CudaKVCache(of, NUM_BLOCKS, BLOCK, torch.device(DEVICE))


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(NUM_BLOCKS)), st.integers(1, NUM_BLOCKS * BLOCK))
def test_a_prefix_is_rounded_into_its_blocks(blocks: list[int], count: int) -> None:
    of = architecture()
    cache = new_cache(of)
    oracle = TorchKVCache(of, NUM_BLOCKS, BLOCK, torch.bfloat16, torch.device("cpu"))
    keys, values = torch.randn(2, 2, count, 3, 20)
    cache.write(blocks, keys, values)
    oracle.write(blocks, keys, values)
    for found, wanted in ((cache.keys, oracle.keys), (cache.values, oracle.values)):
        assert torch.equal(found[:, :-1].flatten(1, 2).cpu(), wanted)
        assert not found[:, cache.spare_block].any()


def test_blocks_are_copied_in_every_layer() -> None:
    """As many as there are, by fewer programs; a block may go to several."""
    cache = new_cache(architecture(num_layers=3))
    cache.keys.normal_()
    cache.values.normal_()
    before = cache.keys.clone(), cache.values.clone()
    copies = torch.tensor([[0, 2], [4, 1], [0, 5], [3, 0], [1, 3]], dtype=torch.int32, device=DEVICE)
    cache.copy_blocks(copies, torch.tensor([3], dtype=torch.int32, device=DEVICE), num_programs=2)
    for found, old in zip((cache.keys, cache.values), before, strict=True):
        wanted = old.clone()
        for source, target in copies[:3].tolist():
            wanted[:, target] = old[:, source]
        assert torch.equal(found, wanted)


def test_blocks_larger_than_a_programs_share_are_copied_whole() -> None:
    cache = new_cache(architecture(kv_heads=8, size=80, num_layers=1))
    cache.keys.normal_()
    cache.values.normal_()
    one = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    cache.copy_blocks(torch.tensor([[2, 5]], dtype=torch.int32, device=DEVICE), one, num_programs=1)
    assert torch.equal(cache.keys[:, 5], cache.keys[:, 2])
    assert torch.equal(cache.values[:, 5], cache.values[:, 2])


def test_the_spare_block_is_resident_but_not_available() -> None:
    of = architecture()
    cache = new_cache(of)
    assert (cache.num_blocks, cache.block_size, cache.spare_block) == (NUM_BLOCKS, BLOCK, NUM_BLOCKS)
    assert cache.keys.shape == (2, NUM_BLOCKS + 1, BLOCK, 3, 20)
    assert cache.num_bytes == (NUM_BLOCKS + 1) * BLOCK * of.kv_bytes_per_token("bfloat16")


def test_the_cache_compiles() -> None:
    assert faults_of("support.gpu.entries.cache") == []
