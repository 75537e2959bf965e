"""What a training step keeps between its passes, and the most it needs on top of that, computed from shapes.

All results are in bytes. N tokens go through the layers, virtual ones included; B rows of T tokens are padded if their
lengths differ, and attend to C positions before their own. e is the size of the compute dtype; float32 takes 4 bytes. L
is the number of layers, D the hidden size, E that of an embedding, Q = H · K and KV = Hkv · K the features of queries
and of keys, I the width of the feed-forward, V the vocabulary size, M the number of learned tokens, R the ranks of low-
rank deltas. With experts, a token goes through k of E.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from manyhats.engine.model.architecture import Architecture, Block, Experts, Group
from manyhats.trainer.memory.adapter_size import AdapterSize
from manyhats.trainer.memory.batch_shape import BatchShape
from manyhats.trainer.model.attention import BLOCK
from manyhats.trainer.model.head import CACHED_VALUES, CHUNK_VALUES

_FLOAT = 4
_INDEX = 8


@dataclass(frozen=True, slots=True)
class Step:
    """What determines the memory that a step needs.

    Attributes:
        element_bytes: e.
        is_quantized: whether the linears are dequantized for each product.
        layer: of which one is spoken.
        reads: whether a task's head reads the hidden states, so that there are no logits of tokens.
    """

    architecture: Architecture
    adapter: AdapterSize
    batch: BatchShape
    element_bytes: int
    is_quantized: bool
    layer: int = 0
    reads: bool = False

    def layers(self) -> list[Step]:
        """The same of each layer."""
        return [replace(self, layer=layer) for layer in range(self.architecture.num_layers)]

    @property
    def num_once(self) -> int:
        """Virtual tokens that run in the layers before all rows; where they see a text they are tokens of its row."""
        return 0 if self.architecture.attention.sees_all else self.adapter.num_in_layers

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.batch.num_tokens + self.num_once

    @property
    def num_before(self) -> int:
        """C."""
        return self.batch.num_shared + self.num_once + self.adapter.num_prefix

    @property
    def num_keys(self) -> int:
        """B · (C + T): each row has its own copy of what comes before it."""
        return self.batch.num_rows * (self.num_before + self.batch.longest)

    @property
    def is_padded(self) -> bool:
        """Whether rows are copied so that they can be processed side by side."""
        batch = self.batch
        return batch.num_tokens - batch.num_shared != batch.num_padded

    @property
    def block(self) -> Block:
        """The layer; all have the same attention."""
        return self.architecture.blocks[self.layer]

    def group(self, name: str) -> Group:
        """The linears that share one input."""
        return next(group for group in self.block.groups() if group.name == name)

    @property
    def experts(self) -> Experts | None:
        """The layer's, if it has any."""
        return self.block.feed_forward.experts

    @property
    def feed_forward(self) -> tuple[str, str]:
        """The groups of the feed-forward's linears, of one expert where there are several: gate and up, and down."""
        first, down = self.block.feed_forward_groups(None if self.experts is None else 0)
        return first.name, down.name

    def width(self, fused: str) -> tuple[int, int, int]:
        """(d_in, Σ d_out, ΣR) of the linears that share one input."""
        group = self.group(fused)
        return group.d_in, group.d_out, sum(self.adapter.ranks.get(name, 0) for name in group.names)

    def is_rescaled(self, fused: str) -> bool:
        """Whether any of these linears is rescaled; each is then computed by itself, with a float32 output."""
        adapter = self.adapter
        return not (adapter.rescaled_outputs | adapter.rescaled_inputs).isdisjoint(self.group(fused).names)

    def output_bytes(self, fused: str) -> int:
        """Size of one value of these linears' output."""
        return _FLOAT if self.is_rescaled(fused) else self.element_bytes


def residual_bytes(step: Step) -> int:
    """The residual stream at one point: 4 · N · D."""
    return _FLOAT * step.num_tokens * step.block.hidden_size


def inputs_kept(step: Step, reads_one: bool) -> int:
    """What is kept of the stream outside the layers: 4 · N · D each.

    It is each layer's input, the last one's output, unless one row of each text is read of it, the embeddings' sum,
    4 · N · E, if that is normed and trained virtual tokens are in it, and for each kind of RoPE a cosine and a sine for
    each pair of rotated values.
    """
    architecture, values = step.architecture, _FLOAT * step.num_tokens
    embedding, ropes = architecture.embedding, {block.attention.rope for block in architecture.blocks}
    is_normed = embedding.norm is not None and step.adapter.num_in_layers > 0
    of_embeddings = values * embedding.size if is_normed else 0
    angles = values * sum(rope.rotary_dim for rope in ropes if rope is not None)
    return (architecture.num_layers + (not reads_one)) * residual_bytes(step) + of_embeddings + angles


def kept_by_linears(step: Step, fused: str) -> int:
    """What the linears that share one input keep for N tokens; nothing if no adapter changes them.

    Low-rank deltas keep e · N · (d_in + ΣR), their input and its product with A; dropout keeps its mask, e · N · d_in.
    Rescaled outputs keep what is multiplied, e · N · d_out; rescaled inputs keep e · N · d_in.
    """
    d_in, _, ranks = step.width(fused)
    adapter, group = step.adapter, step.group(fused)
    outputs = sum(member.d_out for member in group.members if member.name in adapter.rescaled_outputs)
    has_input = ranks > 0 or not adapter.rescaled_inputs.isdisjoint(group.names)
    masks = d_in if ranks and adapter.has_dropout else 0
    return step.element_bytes * step.num_tokens * ((d_in if has_input else 0) + masks + ranks + outputs)


def attention_kept(step: Step) -> int:
    """One layer keeps e · (B·T·Q queries + 2 · B·(C+T)·KV keys and values + B·T·Q result), and what its linears keep.

    If rows are not padded and nothing comes before them, values are a view of the projections, N · (Q + 2·KV). Tokens
    shared by all rows are views too: on top of the rows' copies they keep the queries, keys and projections of all N;
    after a prefix the latter two are copies. A norm of the stream keeps what it norms, 4 · N · D.
    """
    attention, batch, e, tokens = step.block.attention, step.batch, step.element_bytes, step.num_tokens
    query, key = attention.query_size, attention.key_size
    projections = tokens * (query + 2 * key)
    is_view = not step.is_padded and not step.num_before and step.output_bytes("qkv") == e
    values = projections if is_view else step.num_keys * key
    rows = 2 * max(batch.num_padded, batch.num_tokens) * query + step.num_keys * key + values
    if batch.num_shared or step.num_once:
        rows += tokens * query + (0 if step.adapter.num_prefix else tokens * key + projections)
    normed = residual_bytes(step) if step.block.around_attention.stream is not None else 0
    return e * rows + kept_by_linears(step, "qkv") + kept_by_linears(step, "o") + normed


def feed_forward_kept(step: Step) -> int:
    """One layer keeps the stream 4 · N · D, gate and up e · N · 2I (4 if rescaled), and what its linears keep.

    Without a gate it is half as much. With experts it is k times as much, and they keep their outputs too,
    4 · N · k · D, for the gradients of their weights, 4 · N · (E + k), and where their rows are, 3 · 8 · N · k.

    A bottleneck of width b keeps another 4 · N · (2b + D), with D only if nothing else keeps its input.
    """
    block, tokens = step.block, step.num_tokens
    read = block.hidden_size if step.adapter.keeps_bottleneck_input else 0
    of_bottlenecks = sum(_FLOAT * tokens * (2 * width + read) for width in step.adapter.bottlenecks)
    first, down = step.feed_forward
    gate_up = step.output_bytes(first) * tokens * step.width(first)[1]
    if step.experts is not None:
        count = step.experts.num_per_row
        of_router = _FLOAT * tokens * (step.experts.num + count) + 3 * _INDEX * tokens * count
        gate_up = count * (gate_up + residual_bytes(step)) + of_router
    linears = kept_by_linears(step, first) + kept_by_linears(step, down)
    return residual_bytes(step) + gate_up + linears + of_bottlenecks


def layer_kept(step: Step) -> int:
    """What one layer keeps from its forward to its backward pass, not counting its input."""
    return attention_kept(step) + feed_forward_kept(step)


def weights_for_product(step: Step, fused: str) -> int:
    """Dense weights for one product, e · d_out · (d_in + ΣR), unless they already exist in that form.

    Several matrices, or one followed by low-rank columns, are assembled from parts, one dequantized at a time.
    """
    d_in, d_out, ranks = step.width(fused)
    num_members = len(step.group(fused).members)
    parts = 1 if step.is_rescaled(fused) else num_members
    is_joined = parts > 1 or (ranks > 0 and not step.is_rescaled(fused))
    part = d_out * d_in // num_members if step.is_quantized else 0
    joined = d_out * (d_in + ranks) if is_joined else 0
    return step.element_bytes * (part + joined)


def layers_kept(step: Step) -> int:
    """What all layers keep without gradient checkpointing, not counting their inputs."""
    layers = step.layers()
    not_kept = {"nothing": 0, "attention": attention_kept(layers[0]), "layer": layer_kept(layers[0])}
    return sum(layer_kept(each) for each in layers) - not_kept[step.adapter.begins_behind]


def of_largest_layer(step: Step) -> Step:
    """The same of the layer that needs most in its backward pass."""
    return max(step.layers(), key=lambda each: layer_kept(each) + layer_backward(each))


def layer_backward(step: Step) -> int:
    """The most that one layer's backward pass needs on top of what is kept.

    The gradient of the stream, 2 · 4 · N · D, and the largest of

    - down: weights, and e · N · (I + R), the gradient of its input;
    - gate and up, once what down kept has been freed: weights, their gradient e · N · 2I, and that of their input,
      e · N · (D + ΣR);
    - attention, once what the feed-forward kept has been freed: keys, values and their gradients in float32,
      4 · 4 · B·(C+T)·KV, the gradient of the result 4 · B·T·Q and of the queries e · B·T·Q, and for one block of
      queries the scores, their softmax and their gradient, 3 · 4 · B · H · block · (C + T), of the C + T no more
      than the block's windows reach.
    """
    block, batch, e = step.block, step.batch, step.element_bytes
    query, key, num_heads = block.attention.query_size, block.attention.key_size, block.attention.num_heads
    num_queries = min(BLOCK, batch.longest)
    num_seen = step.num_before + batch.longest
    if (window := block.attention.window) is not None:
        sides = 2 if block.attention.sees_all else 1
        num_seen = min(num_seen, num_queries + sides * (window - 1))
    scores = num_queries * num_seen
    attention = 4 * _FLOAT * step.num_keys * key + (_FLOAT + e) * batch.num_padded * query
    attention += 3 * _FLOAT * batch.num_rows * num_heads * scores
    largest = max(feed_forward_backward(step), attention - feed_forward_kept(step))
    return 2 * residual_bytes(step) + largest


def feed_forward_backward(step: Step) -> int:
    """The feed-forward's part of ``layer_backward``.

    Of experts it is one at a time, with half as many rows again as a mean one. The gradients of all outputs take
    4 · N · k · D. Each one's gradient of its input is [N, D], with zeros for other rows, and is added to that of all:
    3 · e · N · D.
    """
    e, tokens, hidden = step.element_bytes, step.num_tokens, step.block.hidden_size
    first, down = step.feed_forward
    shared = 0
    if step.experts is not None:
        shared = (3 * e + _FLOAT * step.experts.num_per_row) * tokens * hidden
        tokens = min(tokens, 3 * tokens * step.experts.num_per_row // (2 * step.experts.num))
    width, _, down_ranks = step.width(down)
    _, num_inside, ranks = step.width(first)
    behind = weights_for_product(step, down) + e * tokens * (width + down_ranks)
    inside = weights_for_product(step, first) + tokens * (
        step.output_bytes(first) * num_inside + e * (hidden + ranks)
    )
    return shared + max(behind, inside - kept_by_linears(step, down))


def head_bytes(step: Step) -> int:
    """The most that the head needs for M learned tokens, computing the logits of some rows at a time.

    It needs three float32 tensors [M, D]; the logits of c = min(M, 2²⁴ / V) rows, which their gradient overwrites,
    e · c · V (three times that if the adapter acts on the head); and, unless they are float32, a float32 copy of a few.
    If there are more rows, each chunk is freed only after the next one has been allocated. A task's own head needs the
    three tensors alone, of M rows that it reads.
    """
    vocab_size, e = step.architecture.vocab_size, step.element_bytes
    targets = step.batch.num_targets
    if step.reads:
        return 3 * _FLOAT * targets * step.architecture.read_size
    rows = min(targets, max(1, CHUNK_VALUES // vocab_size))
    logits = e * rows * vocab_size * (3 if step.adapter.is_on_head else 1)
    logits += e * rows * vocab_size if targets > rows else 0
    in_cache = _FLOAT * min(CACHED_VALUES, rows * vocab_size) if e < _FLOAT else 0
    return 3 * _FLOAT * targets * step.block.hidden_size + logits + in_cache
