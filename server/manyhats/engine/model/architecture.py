"""A model's architecture as data: what is computed, free of tensors, devices, and the names that files use.

The functions of ``families`` build it. Everything that follows from it is derived here and nowhere else: which linears
and norms a block has, which linears share their input, and where adapters may act.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from manyhats.adapters.heads import Pooling
from manyhats.adapters.sites import EMBEDDING, HEAD, ROUTER, Site, expert_linear

SUBLAYERS = ("attention", "feed_forward")
"""The sub-layers of a block; their outputs are sites of bottleneck adapters."""
COUPLINGS = ("first_coupling", "second_coupling")
"""Sites of bottleneck adapters on normed embeddings, in the order in which they act."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm: ``x / √(mean(x²) + eps) · weight`` or, of kind ``layer``, the same of ``x − mean(x)``, plus a bias.

    Attributes:
        eps: added to the mean square.
        span: what the means are over: a ``row``, or each ``head`` separately, with one weight for all heads, or with
            each head's ``own_head``.
        kind: ``rms`` or ``layer``.
        has_weight: whether files have the weight; it is 1 otherwise.
        has_bias: whether something is added afterwards.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467); Ba et al. 2016 (arXiv:1607.06450).
    """

    eps: float
    span: Literal["row", "head", "own_head"] = "row"
    kind: Literal["rms", "layer"] = "rms"
    has_weight: bool = True
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, resolved for one maximum context length.

    ``angle[p, i] = p · inv_freq[i]``; cosines and sines are multiplied by ``attention_scaling``. The
    rotated part of a head is its first ``rotary_dim`` values, by halves (the Hugging Face layout).

    Attributes:
        inv_freq: radians per position, one per pair of rotated values.
        attention_scaling: dimensionless; 1 unless the kind of RoPE scales attention (yarn, longrope).

    Source: Su et al. 2021 (arXiv:2104.09864); kinds as in transformers' ``ROPE_INIT_FUNCTIONS``.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """The number of rotated values per head."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention of each token over those up to it, or over its whole text.

    Attributes:
        num_heads: H, query heads.
        num_kv_heads: Hkv; H is a multiple of it.
        head_dim: K.
        scale: multiplies the scores before the softmax; mostly 1 / √K.
        window: how many of the latest positions a token attends to, including itself; None for all of them. Where it
            sees those that follow, as many of these, including itself.
        softcap: c in ``c · tanh(score / c)``, after ``scale``; None for no cap.
        rope: None if positions do not enter.
        query_norm: of the queries before their rotation; None for none.
        key_norm: of the keys, likewise.
        sees_all: whether tokens see those that follow them, too.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    rope: Rope | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    sees_all: bool = False

    @property
    def query_size(self) -> int:
        """``H · K``."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """``Hkv · K``, for keys and for values."""
        return self.num_kv_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """The number of rotated values per head."""
        return 0 if self.rope is None else self.rope.rotary_dim

    def seen(self, position: int, length: int) -> range:
        """The positions, of a text that has ``length`` so far, that the token at a position attends to."""
        window = length if self.window is None else self.window
        end = position + window if self.sees_all else position + 1
        return range(max(0, position + 1 - window), min(end, length))


@dataclass(frozen=True, slots=True)
class Experts:
    """A feed-forward as a mixture: ``Σ pₑ · expertₑ(x)`` over the k experts to which the ``router`` sends a row.

    The router is a linear without bias, which gives each expert a logit, in float32. A row goes to the experts with the
    largest, of equal ones to those of lower index; pₑ are the softmax of all logits. The sum is in order of index.

    Attributes:
        num: E, of which each is a feed-forward by itself.
        num_per_row: k.
        renormalizes: whether the k weights are divided by their sum.

    Source: Jiang et al. 2024 (arXiv:2401.04088).
    """

    num: int
    num_per_row: int
    renormalizes: bool


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A feed-forward: ``down(activation(gate(x)) · up(x))``, or without a gate ``down(activation(up(x)))``.

    Attributes:
        width: of gate and up; with experts, of each.
        activation: a name in ``manyhats.adapters.activations.ACTIVATIONS``.
        is_gated: whether there is a gate.
        experts: None for one feed-forward that all rows go through.
    """

    width: int
    activation: str
    is_gated: bool = True
    experts: Experts | None = None


@dataclass(frozen=True, slots=True)
class Around:
    """The norms around a sub-layer f, which adds to the residual stream: ``r = stream(r + output(f(before(r))))``."""

    before: Norm | None = None
    output: Norm | None = None
    stream: Norm | None = None


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear: ``y = x Wᵀ + bias``, W [d_out, d_in]."""

    name: str
    d_in: int
    d_out: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class Group:
    """Linears with the same input; a backend may run them as one, with their outputs side by side."""

    name: str
    members: tuple[LinearShape, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the members."""
        return tuple(member.name for member in self.members)

    @property
    def d_in(self) -> int:
        """Input features, which the members share."""
        return self.members[0].d_in

    @property
    def d_out(self) -> int:
        """Output features of all members."""
        return sum(member.d_out for member in self.members)


@dataclass(frozen=True, slots=True)
class NormShape:
    """One norm of a block, and the shape of its weight."""

    name: str
    norm: Norm
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One layer.

    Attributes:
        hidden_size: D, width of the residual stream.
        residual_scale: multiplies a sub-layer's output before it is added to the stream.
        biased: names of the linears that have a bias.
        is_parallel: whether the feed-forward reads the stream as it was before the attention, through a norm of its
            own or, if it has none, through the attention's.
    """

    hidden_size: int
    attention: Attention
    around_attention: Around
    feed_forward: FeedForward
    around_feed_forward: Around
    residual_scale: float = 1.0
    biased: frozenset[str] = frozenset()
    is_parallel: bool = False

    def groups(self) -> tuple[Group, ...]:
        """The linears grouped by input, in forward order; their names are the same in every family."""
        experts = self.feed_forward.experts
        num = 0 if experts is None else experts.num
        return (
            *self.shared_groups(),
            *(group for expert in range(num) for group in self.feed_forward_groups(expert)),
        )

    def shared_groups(self) -> tuple[Group, ...]:
        """Those that all rows go through: all but the experts'."""
        experts = self.feed_forward.experts
        others = self.feed_forward_groups() if experts is None else (self.router(experts),)
        return (*self.attention_groups(), *others)

    def attention_groups(self) -> tuple[Group, Group]:
        """The linears before and behind the attention."""
        hidden, query, key = self.hidden_size, self.attention.query_size, self.attention.key_size
        return (
            self._group("qkv", hidden, {"q_proj": query, "k_proj": key, "v_proj": key}),
            self._group("o", query, {"o_proj": hidden}),
        )

    def router(self, experts: Experts) -> Group:
        """The linear, by itself, that chooses among experts."""
        return self._group(ROUTER, self.hidden_size, {ROUTER: experts.num})

    def feed_forward_groups(self, expert: int | None = None) -> tuple[Group, Group]:
        """The linears before and behind the activation, of one expert where there are experts."""
        hidden, inner = self.hidden_size, self.feed_forward.width
        is_gated = self.feed_forward.is_gated

        def own(name: str) -> str:
            return name if expert is None else expert_linear(expert, name)

        first = ("gate_proj", "up_proj") if is_gated else ("up_proj",)
        return (
            self._group(own("gate_up" if is_gated else "up"), hidden, {own(name): inner for name in first}),
            self._group(own("down"), inner, {own("down_proj"): hidden}),
        )

    def linears(self) -> tuple[LinearShape, ...]:
        """The linears, in forward order."""
        return tuple(member for group in self.groups() for member in group.members)

    def norms(self) -> tuple[NormShape, ...]:
        """The norms it has, in forward order."""
        attention, feed_forward = self.around_attention, self.around_feed_forward
        query, key = self.attention.query_norm, self.attention.key_norm
        return (
            *self._norm("attention_before", attention.before, self.hidden_size),
            *self._norm("query", query, self.attention.query_size),
            *self._norm("key", key, self.attention.key_size),
            *self._norm("attention_output", attention.output, self.hidden_size),
            *self._norm("attention_stream", attention.stream, self.hidden_size),
            *self._norm("feed_forward_before", feed_forward.before, self.hidden_size),
            *self._norm("feed_forward_output", feed_forward.output, self.hidden_size),
            *self._norm("feed_forward_stream", feed_forward.stream, self.hidden_size),
        )

    def norm_before(self, sublayer: str) -> NormShape | None:
        """The norm through which a sub-layer reads the stream; None if it reads that itself."""
        norms = {shape.name: shape for shape in self.norms()}
        own = norms.get(f"{sublayer}_before")
        return norms.get("attention_before") if own is None and self.is_parallel else own

    def _group(self, name: str, d_in: int, sizes: Mapping[str, int]) -> Group:
        members = (LinearShape(each, d_in, d_out, each in self.biased) for each, d_out in sizes.items())
        return Group(name, tuple(members))

    def _norm(self, name: str, norm: Norm | None, width: int) -> tuple[NormShape, ...]:
        if norm is None:
            return ()
        head_dim = self.attention.head_dim
        shapes = {"row": (width,), "head": (head_dim,), "own_head": (width // head_dim, head_dim)}
        return (NormShape(name, norm, shapes[norm.span]),)


@dataclass(frozen=True, slots=True)
class Learned:
    """Learned vectors of the positions: that of position p, row ``p + offset`` of a table, is added to the stream."""

    num_rows: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Embedding:
    """From token ids to the residual stream.

    Attributes:
        num_tokens: V.
        size: E, of an embedding; a linear, ``embedding_projection``, makes D of it where that differs.
        scale: multiplies the embeddings.
        positions: added to the stream; None if the layers see positions in another way.
        num_token_types: rows of a table from which each token's type adds one; 0 for none.
        norm: of the sum, before it is projected; None for none.
    """

    num_tokens: int
    size: int
    scale: float = 1.0
    positions: Learned | None = None
    num_token_types: int = 0
    norm: Norm | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """From the normed stream to logits.

    Attributes:
        is_tied: whether its matrix is the embedding.
        size: E, of its input; a linear, ``head_projection``, makes it of the normed stream where D differs.
        has_bias: whether its linear has a bias.
        divisor: divides the logits.
        softcap: c in ``c · tanh(logit / c)``, after ``divisor``; None for no cap.
    """

    is_tied: bool
    size: int
    has_bias: bool = False
    divisor: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Pooler:
    """What an encoder's files may have in front of a task's classifier: a linear and an activation.

    Attributes:
        pooling: what it reads: the first row, or the mean of all rows.
        has_bias: of its linear.
        norm: of its output; None for none.
    """

    pooling: Pooling = Pooling.FIRST
    has_bias: bool = True
    norm: Norm | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One model: a decoder, or an encoder, which has no output head.

    Attributes:
        model_type: Hugging Face ``model_type``, such as ``llama``.
        max_context_length: the maximum of prompt and output tokens together.
        blocks: L of them; windows, RoPE, norms and whether there are experts may differ, heads do not, nor the width
            of linears of one name.
        final_norm: of the stream, after the last block; None for none.
        head: None for an encoder.
        pooler: of an encoder.
        shared: for each layer, which set of weights it runs, counted from 0 in the order of their first use; empty if
            each has its own.
    """

    model_type: str
    max_context_length: int
    embedding: Embedding
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    head: Head | None
    pooler: Pooler = Pooler()
    shared: tuple[int, ...] = ()

    @property
    def read_size(self) -> int:
        """Values of a row as it leaves the model: E of the head, or D."""
        return self.hidden_size if self.head is None else self.head.size

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embedding.num_tokens

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.blocks[0].hidden_size

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.blocks)

    def set_of(self, layer: int) -> int:
        """The number of the set of weights that a layer runs: mostly its own."""
        return self.shared[layer] if self.shared else layer

    @property
    def num_sets(self) -> int:
        """How many sets of weights the layers have: L, unless they share them."""
        return len(set(self.shared)) or self.num_layers

    @property
    def attention(self) -> Attention:
        """The first block's attention; number and size of heads are the same in every block."""
        return self.blocks[0].attention

    @property
    def kv_values_per_token(self) -> int:
        """The number of key and value features of one position in all layers."""
        return 2 * self.num_layers * self.attention.key_size

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one position in all layers, stored as ``float32``, ``bfloat16`` or ``int8``.

        As int8 each head's keys, and each head's values, have a float32 scale.
        """
        values = self.kv_values_per_token
        if dtype == "int8":
            return values + 4 * values // self.attention.head_dim
        return values * (4 if dtype == "float32" else 2)

    def num_linear_parameters(self) -> int:
        """The number of parameters in the blocks' matrices, without biases and routers; shared ones count once."""
        return sum(
            linear.d_in * linear.d_out
            for block in self.blocks[: self.num_sets]
            for linear in linears_by_name(block).values()
            if linear.name != ROUTER
        )

    def shared_groups(self) -> Mapping[str, Group]:
        """The groups of linears, but for experts, that any block has, by name, in forward order."""
        return {group.name: group for block in dict.fromkeys(self.blocks) for group in block.shared_groups()}

    def linears(self) -> Mapping[str, LinearShape]:
        """The linears that any block has, by name."""
        blocks = dict.fromkeys(self.blocks)
        return {name: linear for block in blocks for name, linear in linears_by_name(block).items()}

    def stream_places(self) -> Mapping[str, tuple[int, int]]:
        """Where bottlenecks act on the stream: name → in how many layers, and D.

        Besides the sub-layers' outputs, which they change before these are added, it is what leaves an encoder's layer,
        and, in two steps, its normed embeddings, of size E.
        """
        names = (*SUBLAYERS, *(("output",) if self.attention.sees_all else ()))
        places = dict.fromkeys(names, (self.num_layers, self.hidden_size))
        if self.embedding.norm is None:
            return places
        return places | dict.fromkeys(COUPLINGS, (1, self.embedding.size))

    def sites(self) -> tuple[Site, ...]:
        """Where adapters may act: embedding, head if there is one, each linear, and the output of each sub-layer."""
        places = (
            Site(layer, name)
            for layer, block in enumerate(self.blocks)
            for name in (*linears_by_name(block), *SUBLAYERS)
        )
        return (EMBEDDING, *(() if self.head is None else (HEAD,)), *places)


@functools.cache
def linears_by_name(block: Block) -> Mapping[str, LinearShape]:
    """A block's linears, of which there may be hundreds."""
    return {linear.name: linear for linear in block.linears()}
