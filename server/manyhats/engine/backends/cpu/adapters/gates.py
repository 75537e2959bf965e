"""Gates: what all rows of a text share, the mean of a sigmoid over its rows, summed in their order.

A step has each text whole, so a text's gate depends on nothing else. What gates say stands in
``manyhats.adapters.primitives.Gate``.
"""

from __future__ import annotations

import numpy as np

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters import bottleneck as at_sublayer
from manyhats.engine.backends.cpu.adapters import deltas as at_linears
from manyhats.engine.backends.cpu.adapters.bottleneck import pick, sigmoid
from manyhats.engine.backends.cpu.addresses import array_at, bytes_at, floats_at, ints_at, longs_at
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.int8 import scale_keys, scale_values
from manyhats.engine.backends.cpu.simd import fma, load, load_address, sum_lanes, zero

# Columns of the table of prefixes: which layers have gates; and per layer and slot, the addresses of those of keys and
# values, 0 for none.
HAS_PREFIX_GATES, KEY_GATE, VALUE_GATE = range(3)
NUM_PREFIX_COLUMNS = 3


@inner
def open_gate(x, at, size, gate, like):
    """σ(x · w + b) of one row; the gate is the address of w, then b."""
    total = zero()
    for i in range(0, size, 8):
        total = fma(load(x, at + i), load_address(gate + 4 * i, like), total)
    return sigmoid(np.float64(sum_lanes(total) + floats_at(gate)[size]))


@inner
def mean_gate(x, first, last, size, gate):
    """The mean over rows first … last of x."""
    total = 0.0
    for row in range(first, last):
        total += open_gate(x, row * size, size, gate, x)
    return np.float32(total / (last - first))


@inner
def num_gate_shares(op, frame):
    """A share is a text, at one linear of a group."""
    if frame[col.NUM_ADAPTER_ROWS] == 0:
        return 0
    kind, layer = op[col.INSTRUCTION], op[col.LAYER]
    if kind == col.GATE_LINEARS:
        table = at_linears.table_of(op, frame)
        has_gates = bytes_at(table[at_linears.HAS_GATES])[layer]
        return frame[col.NUM_TEXTS] * table[at_linears.NUM_MEMBERS] if has_gates else 0
    if kind == col.GATE_SUBLAYER:
        table = at_sublayer.table_of(op, frame)
        return frame[col.NUM_TEXTS] if bytes_at(table[at_sublayer.HAS_GATES])[layer] else 0
    table = longs_at(frame[col.PREFIX_TABLE])
    return frame[col.NUM_TEXTS] if bytes_at(table[HAS_PREFIX_GATES])[layer] else 0


@inner
def rows_of_text(text, frame):
    """A text's first row, and one past its last."""
    starts = ints_at(frame[col.QUERY_START])
    return np.int64(starts[text]), np.int64(starts[text + 1])


@inner
def entry_of_text(op, text, frame):
    """Where tables have a text's adapter, at the instruction's layer."""
    return op[col.LAYER] * frame[col.NUM_SLOTS] + ints_at(frame[col.TEXT_SLOTS])[text]


@inner
def gate_linears(op, share, frame, buffers):
    """The gate of one text at one linear: source holds x, target the gates."""
    table = at_linears.table_of(op, frame)
    members = table[at_linears.NUM_MEMBERS]
    text = share // members
    member = share - text * members
    entry = entry_of_text(op, text, frame) * members + member
    gate = longs_at(table[at_linears.GATE_ADDRESS])[entry]
    if gate != 0:
        first, last = rows_of_text(text, frame)
        x, gates = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
        gates[text * col.GATES_OF_TEXT + member] = mean_gate(x, first, last, op[col.SIZE], gate)


@inner
def gate_sublayer(op, numbers, text, frame, buffers, scratch, at):
    """The gate of one text at a sub-layer: source is the stream r, target its output m; scratch has room for a row."""
    table = at_sublayer.table_of(op, frame)
    entry = entry_of_text(op, text, frame)
    integers = ints_at(table[at_sublayer.INTEGERS] + 4 * at_sublayer.NUM_INTEGERS * entry)
    addresses = longs_at(table[at_sublayer.ADDRESSES] + 8 * at_sublayer.NUM_ADDRESSES * entry)
    if integers[at_sublayer.SIZE] == 0 or addresses[at_sublayer.GATE] == 0:
        return
    residual, output = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
    first, last = rows_of_text(text, frame)
    size = op[col.SIZE]
    total = 0.0
    for row in range(first, last):
        pick(integers[at_sublayer.INPUT], residual, output, row * size, size, op, numbers, scratch, at)
        total += open_gate(scratch, at, size, addresses[at_sublayer.GATE], scratch)
    gates = floats_at(buffers[op[col.GATES]])
    gates[text * col.GATES_OF_TEXT] = np.float32(total / (last - first))


@inner
def gate_prefix(op, text, frame, buffers, like, scratch, at):
    """Multiplies one layer's keys and values of a text's prefix, which are no other's, by its gates.

    Args:
        op: source holds the attention's input.
        text: whose.
        frame, buffers: of the step.
        like: an array of the cache's dtype.
        scratch: from ``at`` on, as many values as a block has cells.
    """
    table, entry = longs_at(frame[col.PREFIX_TABLE]), entry_of_text(op, text, frame)
    key_gate, value_gate = longs_at(table[KEY_GATE])[entry], longs_at(table[VALUE_GATE])[entry]
    if key_gate == 0:
        return
    first, last = rows_of_text(text, frame)
    x, size = floats_at(buffers[op[col.SOURCE]]), op[col.SIZE]
    key_factor = mean_gate(x, first, last, size, key_gate)
    value_factor = key_factor
    if value_gate != key_gate:
        value_factor = mean_gate(x, first, last, size, value_gate)
    block_size = frame[col.BLOCK_SIZE]
    left = ints_at(frame[col.CONTEXT_LEN])[text] - (last - first)
    index = text * frame[col.MAX_BLOCKS]
    while left > 0:
        count = min(left, block_size)
        for i in range(block_size):
            scratch[at + i] = key_factor if i < count else np.float32(1.0)
        block = np.int64(ints_at(frame[col.BLOCK_TABLES])[index])
        scale_block(op, block, count, value_factor, frame, like, scratch, at)
        left -= count
        index += 1


@inner
def scale_block(op, block, count, value_factor, frame, like, scratch, at):
    """A block's keys times the factors in scratch, and ``count`` of its cells' values times one."""
    layer, block_size, head_dim = op[col.LAYER], frame[col.BLOCK_SIZE], frame[col.HEAD_DIM]
    keys = array_at(frame[col.KEYS] + layer * frame[col.LAYER_BYTES], like)
    values = array_at(frame[col.VALUES] + layer * frame[col.LAYER_BYTES], like)
    scales = 4 * layer * frame[col.LAYER_SCALES]
    key_scales, value_scales = (
        floats_at(frame[col.KEY_SCALES] + scales),
        floats_at(frame[col.VALUE_SCALES] + scales),
    )
    for head in range(frame[col.NUM_KV_HEADS]):
        cell = (head * frame[col.NUM_BLOCKS] + block) * block_size
        scale_keys(keys, cell * head_dim, head_dim, block_size, key_scales, cell, scratch, at)
        scale_values(values, cell * head_dim, head_dim, count, value_scales, cell, value_factor)
