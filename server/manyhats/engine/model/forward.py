"""A decoder's forward in plain, differentiable torch: which operations run, in which order, and what is added.

It is the specification for fast kernels, and what the torch backend and the trainer run. The caller supplies the
operations, each with the deltas of its rows. The residual stream is float32; the dtype of everything else is up to the
operations. No variable here outlives its last use, since in training that would cost memory.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from manyhats.adapters.sites import Site
from manyhats.engine.model.architecture import (
    Architecture,
    Block,
    Embedding,
    Experts,
    FeedForward,
    Group,
    Head,
    Learned,
    Norm,
    Rope,
)
from manyhats.engine.model.weights import BlockWeights, NormWeight, Weights

StreamNorm = tuple[Norm, NormWeight]
"""The norm of the stream behind a sub-layer."""


class Maths(Protocol):
    """The operations of one pass over N rows."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding, as the rows' adapters have them: [N] → [N, E]."""
        ...

    def locate(self, learned: Learned) -> Tensor:
        """The learned vectors of the rows' positions: [N, D]."""
        ...

    def token_types(self) -> Tensor:
        """The learned vectors of the rows' types: [N, E or D]."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """Normed embeddings, with what else enters behind their norm: [N, E] → [N, E]."""
        ...

    def project(self, name: str, x: Tensor) -> Tensor:
        """A linear outside the blocks, by its name in ``Weights.outer``: [N, d_in] → [N, d_out]."""
        ...

    def linears(self, layer: int, group: Group, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """The outputs of a group's members side by side, with their deltas: [N, d_in] → [N, d_out].

        Where ``rows`` are given, int64, x holds the inputs of these rows only.
        """
        ...

    def norm(self, x: Tensor, norm: Norm, weight: NormWeight) -> Tensor:
        """The norm of an input of linears or heads: [..., shape of the weight] → the same shape."""
        ...

    def output_norm(self, x: Tensor, norm: Norm, weight: NormWeight) -> Tensor:
        """The norm of a sub-layer's output, float32: [N, D] → [N, D]."""
        ...

    def rotate(self, heads: Tensor, rope: Rope) -> Tensor:
        """Heads rotated by their rows' positions: [N, H, K] → the same shape."""
        ...

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of each row over its sequence: [N, H, K], [N, Hkv, K] twice → [N, H, K]."""
        ...

    def activate(self, gate_up: Tensor, feed_forward: FeedForward) -> Tensor:
        """The activation, if there is a gate that of the first half times the second: [N, I or 2·I] → [N, I]."""
        ...

    def mix(self, layer: int, spec: Block, x: Tensor) -> Tensor:
        """A mixture of experts: [N, D] → [N, D] float32."""
        ...

    def join(self, site: Site, stream: Tensor, output: Tensor, norm: StreamNorm | None) -> Tensor:
        """Stream + output as the rows' bottlenecks change it, normed if there is a norm: [N, D] twice → [N, D]."""
        ...

    def output(self, layer: int, stream: Tensor) -> Tensor:
        """The stream behind an encoder's layer, as the rows' bottlenecks change it: [N, D] → [N, D]."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """The output head, as the rows' adapters have it: [M, D] → [M, V]."""
        ...


def embedded(maths: Maths, embedding: Embedding, token_ids: Tensor) -> Tensor:
    """The tokens' vectors: [N] → [N, E]; virtual tokens have theirs from adapters."""
    x = maths.embed(token_ids)
    return x if embedding.scale == 1.0 else x * embedding.scale


def entered(maths: Maths, architecture: Architecture, weights: Weights, x: Tensor) -> Tensor:
    """The initial stream, from the vectors of all tokens, virtual ones included: [N, E] → [N, D].

    Where the sum of the embeddings is normed, it is projected afterwards; otherwise before positions are added.
    """
    embedding = architecture.embedding
    is_projected, norm = embedding.size != architecture.hidden_size, embedding.norm
    if is_projected and norm is None:
        x = maths.project("embedding_projection", x)
    if embedding.positions is not None:
        x = x + maths.locate(embedding.positions)
    if embedding.num_token_types:
        x = x + maths.token_types()
    if norm is not None and weights.embedding_norm is not None:
        x = maths.enter(maths.output_norm(x, norm, weights.embedding_norm))
    return maths.project("embedding_projection", x) if is_projected and norm is not None else x


def left(maths: Maths, architecture: Architecture, weights: NormWeight | None, stream: Tensor) -> Tensor:
    """What the output head, or a task's, reads: [N, D] → [N, E]."""
    if architecture.final_norm is not None and weights is not None:
        stream = maths.output_norm(stream, architecture.final_norm, weights)
    is_projected = architecture.read_size != architecture.hidden_size
    return maths.project("head_projection", stream) if is_projected else stream


def block(maths: Maths, spec: Block, weights: BlockWeights, layer: int, stream: Tensor) -> Tensor:
    """The stream after one block: [N, D] → [N, D]."""
    output = _attention(maths, spec, weights, layer, stream)
    beside = _feed_forward(maths, spec, weights, layer, stream) if spec.is_parallel else None
    stream = _joined(maths, spec, weights, Site(layer, "attention"), stream, output)
    output = _feed_forward(maths, spec, weights, layer, stream) if beside is None else beside
    stream = _joined(maths, spec, weights, Site(layer, "feed_forward"), stream, output)
    return maths.output(layer, stream) if spec.attention.sees_all else stream


def logits(maths: Maths, head: Head, hidden: Tensor) -> Tensor:
    """The logits of normed rows: [M, D] → [M, V]."""
    return scaled_logits(maths.head(hidden), head)


def scaled_logits(x: Tensor, head: Head) -> Tensor:
    """The output head's results scaled and capped: ``c · tanh(x / divisor / c)``, if there is a cap."""
    if head.divisor != 1.0:
        x = x / head.divisor
    if head.softcap is not None:
        x = head.softcap * torch.tanh(x / head.softcap)
    return x


def _attention(maths: Maths, spec: Block, weights: BlockWeights, layer: int, stream: Tensor) -> Tensor:
    attention, (inside, behind) = spec.attention, spec.attention_groups()
    sizes = [member.d_out for member in inside.members]
    qkv = maths.linears(layer, inside, _read(maths, spec, "attention", weights, stream))
    queries, keys, values = qkv.split(sizes, dim=1)
    if attention.query_norm is not None:
        queries = _grouped_norm(maths, queries, attention.query_norm, weights.norms["query"])
    if attention.key_norm is not None:
        keys = _grouped_norm(maths, keys, attention.key_norm, weights.norms["key"])
    queries, keys, values = (part.unflatten(1, (-1, attention.head_dim)) for part in (queries, keys, values))
    if attention.rope is not None:
        queries, keys = maths.rotate(queries, attention.rope), maths.rotate(keys, attention.rope)
    mixed = maths.attend(layer, queries, keys, values)
    return maths.linears(layer, behind, mixed.flatten(1))


def _feed_forward(maths: Maths, spec: Block, weights: BlockWeights, layer: int, stream: Tensor) -> Tensor:
    x = _read(maths, spec, "feed_forward", weights, stream)
    if spec.feed_forward.experts is not None:
        return maths.mix(layer, spec, x)
    first, down = spec.feed_forward_groups()
    return maths.linears(layer, down, maths.activate(maths.linears(layer, first, x), spec.feed_forward))


def mixed_by_expert(maths: Maths, layer: int, spec: Block, x: Tensor) -> Tensor:
    """What each row's experts make of it, times their weights, summed in order: [N, D] → [N, D] float32.

    Each expert runs on its own rows; how many these are must be known before it is launched.
    """
    experts = spec.feed_forward.experts
    assert experts is not None
    chosen, shares = routed(maths.linears(layer, spec.router(experts), x).float(), experts)
    pairs = chosen.flatten().argsort(stable=True)  # of a row and one of its experts, by expert
    used, counts = chosen.unique(return_counts=True)
    outputs = []
    for expert, rows in zip(
        used.tolist(), (pairs // experts.num_per_row).split(counts.tolist()), strict=True
    ):
        first, down = spec.feed_forward_groups(expert)
        inside = maths.activate(maths.linears(layer, first, x[rows], rows), spec.feed_forward)
        outputs.append(maths.linears(layer, down, inside, rows))
    places = pairs.argsort()
    of_rows = torch.cat(outputs)[places].float().unflatten(0, (-1, experts.num_per_row))
    total = torch.zeros_like(x, dtype=torch.float32)
    for output, share in zip(of_rows.unbind(1), shares.unbind(1), strict=True):
        total = total + output * share.unsqueeze(1)
    return total


def routed(router_logits: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """Each row's experts, in order, and their weights: [N, E] float32 → [N, k] int64 and float32."""
    order = torch.sort(router_logits, dim=1, descending=True, stable=True).indices
    chosen = order[:, : experts.num_per_row].sort(dim=1).values
    shares = torch.softmax(router_logits, dim=1).gather(1, chosen)
    if experts.renormalizes:
        shares = shares / shares.sum(dim=1, keepdim=True)
    return chosen, shares


def _read(maths: Maths, spec: Block, sublayer: str, weights: BlockWeights, stream: Tensor) -> Tensor:
    """What a sub-layer reads from the stream."""
    shape = spec.norm_before(sublayer)
    return stream if shape is None else maths.norm(stream, shape.norm, weights.norms[shape.name])


def _grouped_norm(maths: Maths, x: Tensor, norm: Norm, weight: NormWeight) -> Tensor:
    """The norm over as many values at a time as the weight has: a head, each with its own or not, or the whole row."""
    return maths.norm(x.unflatten(1, (-1, *weight.weight.shape[-1:])), norm, weight).flatten(1)


def _joined(
    maths: Maths, spec: Block, weights: BlockWeights, site: Site, stream: Tensor, output: Tensor
) -> Tensor:
    around = spec.around_attention if site.name == "attention" else spec.around_feed_forward
    if around.output is not None:
        output = maths.output_norm(output, around.output, weights.norms[f"{site.name}_output"])
    if spec.residual_scale != 1.0:
        output = output.float() * spec.residual_scale
    norm = around.stream
    return maths.join(
        site, stream, output, None if norm is None else (norm, weights.norms[f"{site.name}_stream"])
    )
