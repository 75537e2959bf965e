"""What the step's kernel reads, column by column: instructions, and a step's frame."""

from __future__ import annotations

# Instructions.
(
    RMS_NORM,
    ADD,
    ADD_RMS_NORM,
    SCALE,
    SILU,
    GELU_TANH,
    SOFTCAP,
    GATHER,
    NORM_HEADS,
    ROTATE,
    ATTENTION,
    LINEAR,
    RESCALED,
    DELTAS,
    BOTTLENECK,
) = range(15)

# Columns of every instruction: its kind, the column of the frame that has its number of rows, and the buffers that it
# reads and writes. The others differ by kind: sizes, and addresses of weights.
INSTRUCTION, ROWS, SOURCE, TARGET, SIZE = range(5)
# Of norms and sums; STREAM is the buffer that is added to.
WEIGHT, STREAM = 5, 6
# Of norms over heads; SIZE is that of a whole row.
QUERY_WEIGHT, QUERY_NORMED, QUERY_SIZE, KEY_WEIGHT, KEY_NORMED, KEY_SIZE = range(5, 11)
# Of the rotation and of attention; SIZE is that of a whole row.
LAYER, COS, SIN, HALF, NUM_HEADS = range(5, 10)
OUT_SIZE, WINDOW = 6, 7
# Of linears and deltas; SIZE is the number of inputs, and LAYER is where it is for the rotation.
KIND, NUM_OUT, GROUP = 6, 7, 8
PANEL_ROWS, WEIGHTS, ABSMAX, ROW_BLOCK, ROW_OFFSET, NESTED, NESTED_CODE, BIAS = range(9, 17)
NUM_COLUMNS = 17
# Kinds of weights: NF4 whose scales are quantized, NF4 whose scales are not, and dense ones.
NESTED_NF4, PLAIN_NF4, BFLOAT16, FLOAT32 = range(4)

# Columns of the frame, which holds a step's counts and the addresses of its arrays. The last ones belong to the call:
# instructions and their numbers, the buffers' addresses, counters [2, instructions] that start at zero, and scratch.
(
    NUM_ROWS,
    NUM_LOGIT_ROWS,
    NUM_ADAPTER_ROWS,
    NUM_RESCALED_ROWS,
    NUM_TILES,
    MAX_BLOCKS,
    NUM_KV_HEADS,
    HEAD_DIM,
    BLOCK_SIZE,
    LAYER_BYTES,
    NUM_SLOTS,
    POSITIONS,
    CELLS,
    TILES,
    QUERY_START,
    CONTEXT_LEN,
    BLOCK_TABLES,
    LOGIT_ROWS,
    ADAPTER_ROWS,
    ADAPTER_SLOTS,
    RESCALED_ROWS,
    RESCALED_SLOTS,
    KEYS,
    VALUES,
    LINEAR_TABLES,
    SUBLAYER_TABLES,
    NUM_THREADS,
    NUM_INSTRUCTIONS,
    INSTRUCTIONS,
    NUMBERS,
    BUFFERS,
    COUNTERS,
    SCRATCH,
    SCRATCH_SIZE,
) = range(34)
FRAME_SIZE = 34
