"""K14: blocks of keys and values copied whole."""

import triton
import triton.language as tl


@triton.jit
def copy_blocks(
    keys, values, copies, count, LAYER_STRIDE, SIZE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Block source to block target, in every layer.

    Args:
        keys, values: [L, blocks, SIZE], layers ``LAYER_STRIDE`` apart.
        copies: [C, 2] int32, source and target; no target is another one's source.
        count: [1] int32, how many copies there are.

    Grid: any number of programs, which walk the copies, and the layers.
    """
    layer = tl.program_id(1).to(tl.int64) * LAYER_STRIDE
    for item in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        source = layer + tl.load(copies + item * 2).to(tl.int64) * SIZE
        target = layer + tl.load(copies + item * 2 + 1).to(tl.int64) * SIZE
        for start in range(0, SIZE, CHUNK):
            i = start + tl.arange(0, CHUNK)
            tl.store(keys + target + i, tl.load(keys + source + i, mask=i < SIZE), mask=i < SIZE)
            tl.store(values + target + i, tl.load(values + source + i, mask=i < SIZE), mask=i < SIZE)
