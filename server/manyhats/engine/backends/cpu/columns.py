"""What the step's kernel reads, column by column: instructions, and a step's frame."""

from __future__ import annotations

# Instructions.
(
    NORM,
    ADD,
    ADD_NORM,
    LOCATE,
    SCALE,
    SILU,
    GELU_TANH,
    GELU,
    RELU,
    SOFTCAP,
    GATHER,
    SCATTER,
    QUANTIZE,
    NARROW,
    REFINE,
    REFINE_ALLOWED,
    EXACT_LOGITS,
    NORM_HEADS,
    ROTATE,
    ATTENTION,
    LINEAR,
    RESCALED,
    DELTAS,
    BOTTLENECK,
    UNNORMED,
    GATE_LINEARS,
    GATE_SUBLAYER,
    GATE_PREFIX,
    ROUTE,
    PAIR,
    SPREAD,
    EXPERT_LINEAR,
    EXPERT_DELTAS,
    COMBINE,
) = range(34)

# Columns of every instruction: its kind, the column of the frame that has its number of rows, and the buffers that it
# reads and writes. The others differ by kind: sizes, and addresses of weights.
INSTRUCTION, ROWS, SOURCE, TARGET, SIZE = range(5)
# Of norms and sums; STREAM is the buffer that is added to, IS_LAYER whether the mean is taken off. Of learned positions
# and types of tokens WEIGHT is the address of the table, whose row OFFSET is that of position or type 0.
WEIGHT, NORM_BIAS, IS_LAYER, STREAM = range(5, 9)
OFFSET = 6
# Of these and of a copy of some rows: the column of the frame with the address of the rows' numbers.
WHICH_ROWS = 7
# Of activations: whether a row holds a gate, then what it multiplies.
IS_GATED = 5
# Of norms over heads; SIZE is that of a whole row, IS_LAYER where it is for other norms. HEAD_STRIDE is how far the
# weights of two heads are apart, 0 where they share them.
QUERY_WEIGHT, QUERY_BIAS = 5, 6
QUERY_NORMED, QUERY_SIZE, KEY_WEIGHT, KEY_BIAS, KEY_NORMED, KEY_SIZE, HEAD_STRIDE = range(8, 15)
# Of the rotation and of attention; SIZE is that of a whole row.
LAYER, COS, SIN, HALF, NUM_HEADS = range(5, 10)
OUT_SIZE, WINDOW, SEES_ALL = 6, 7, 8
# Of linears, deltas and what makes logits exact; SIZE is the number of inputs, and LAYER is where it is for the
# rotation. WHICH is the buffer that says which logits.
KIND, NUM_OUT, GROUP = 6, 7, 8
WHICH = 8
PANEL_ROWS, WEIGHTS, ABSMAX, ROW_BLOCK, ROW_OFFSET, NESTED, NESTED_CODE, BIAS = range(9, 17)
# Of bottlenecks, whose GROUP is the sub-layer: the norm of the stream behind them, whose weight has the address 0 if
# there is none.
STREAM_WEIGHT, STREAM_BIAS, IS_STREAM_LAYER = range(9, 12)
# Of these and of deltas: the buffer of their gates, ``GATES_OF_TEXT`` of each text; 0 if there are none.
GATES = 12
GATES_OF_TEXT = 4
# Of what experts do: the buffers of rows' experts and of pairs, and how many experts there are, or a row has; whether
# weights are divided by their sum. NUM_USED is the address of how many experts have pairs, int64. Of their linears,
# WEIGHTS is the address of [E, columns], instructions of which nothing but the weights counts, and ROW_WORDS the 32-bit
# words of a row of the source.
NUM_EXPERTS, NUM_PER_ROW = 5, 6
RENORMALIZES = ROUTES = PAIRS = 8
ROW_WORDS, NUM_USED = 11, 12
# Of adapters' deltas on experts: which of an expert's linears, and how many, are side by side in the target; whether a
# row of the source is a pair's.
FIRST_MEMBER, NUM_MEMBERS, IS_OF_PAIRS = range(9, 12)
NUM_COLUMNS = 17
# Kinds of weights: NF4 whose scales are quantized, NF4 whose scales are not, dense ones; NF4 and int8 for inputs in
# integers; dense ones whose outputs are the lanes, of which PAIRS are for inputs in bfloat16.
(
    NESTED_NF4,
    PLAIN_NF4,
    BFLOAT16,
    FLOAT32,
    NF4_BY_INT16,
    INT8,
    FLOAT32_GROUPS,
    BFLOAT16_GROUPS,
    BFLOAT16_PAIRS,
) = range(9)

# Columns of the frame, which holds a step's counts and the addresses of its arrays. The last ones belong to the call:
# instructions and their numbers, the buffers' addresses, counters [2, instructions] that start at zero, scratch,
# where the clock goes, [instructions + 1, 2]: seconds and nanoseconds at the start and after each; 0 for nowhere; and
# the C functions that carry out a share of an instruction: one that reads neither cache nor adapters, the cache, them.
(
    NUM_ROWS,
    NUM_TEXTS,
    NUM_LOGIT_ROWS,
    NUM_HIDDEN_ROWS,
    NUM_NORMED_ROWS,
    NUM_PAIRS,
    NUM_ADAPTER_ROWS,
    NUM_DELTA_TILES,
    NUM_RESCALED_ROWS,
    NUM_UNITS,
    MAX_BLOCKS,
    NUM_KV_HEADS,
    HEAD_DIM,
    BLOCK_SIZE,
    NUM_BLOCKS,
    LAYER_BYTES,
    NUM_SLOTS,
    POSITIONS,
    CELLS,
    UNITS,
    QUERY_START,
    TEXT_SLOTS,
    CONTEXT_LEN,
    BLOCK_TABLES,
    LOGIT_ROWS,
    HIDDEN_ROWS,
    NORMED_ROWS,
    TOKEN_TYPES,
    ADAPTER_ROWS,
    ADAPTER_SLOTS,
    DELTA_TILES,
    RESCALED_ROWS,
    RESCALED_SLOTS,
    KEYS,
    VALUES,
    LAYER_SCALES,
    KEY_SCALES,
    VALUE_SCALES,
    RECORDS,
    FINISHED,
    LINEAR_TABLES,
    SUBLAYER_TABLES,
    PREFIX_TABLE,
    EXPERT_ENTRIES,
    HAS_EXPERT_ENTRIES,
    NUM_THREADS,
    NUM_INSTRUCTIONS,
    INSTRUCTIONS,
    NUMBERS,
    BUFFERS,
    COUNTERS,
    SCRATCH,
    SCRATCH_SIZE,
    TIMES,
    PLAIN_SHARE,
    CACHE_SHARE,
    ADAPTER_SHARE,
) = range(57)
FRAME_SIZE = 57

# Columns of a unit of attention: its sequence, its first query row within that, and how many; how many units share
# this tile of rows; if several do, the tile's number among such tiles, and where the records of its parts begin, in
# parts of a row; the unit's first part, and one past its last.
(
    UNIT_SEQUENCE,
    UNIT_FIRST_ROW,
    UNIT_ROWS,
    UNIT_COUNT,
    UNIT_TILE,
    UNIT_RECORD,
    UNIT_FIRST_PART,
    UNIT_LAST_PART,
) = range(8)
UNIT_SIZE = 8
