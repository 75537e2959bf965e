"""What a family computes and where its files keep it, in words that follow from its architecture and layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

from manyhats.engine.model.architecture import Architecture, Attention, Norm
from manyhats.engine.model.layout import Family, Stored

_PLACES = {
    "before": "before sub-layers",
    "output": "behind sub-layers",
    "stream": "of the stream behind sub-layers",
}
_SPANS = {
    "row": "over the row",
    "head": "over each head",
    "own_head": "over each head, with weights of its own",
}
_OF_EXPERT = re.compile(r"(?<=experts)\.\d+\.")
_ROWS = {"blocks": "one below the other", "heads": "head by head", "groups": "by groups of heads"}


def title(function: Callable[..., Family]) -> str:
    """What a family is, by its function's docstring."""
    return (function.__doc__ or "").strip().partition("\n")[0].removesuffix(".").replace("``", "`")


def computes(family: Family) -> str:
    """What a family's blocks and ends compute, with its default sizes."""
    return "; ".join(
        (*_block(family.architecture), *_attention(family.architecture), *_ends(family.architecture))
    )


def files(family: Family) -> str:
    """A layer's path, and its modules."""
    layout = family.layout
    path = f"{layout.prefix}{layout.layer.replace('{layer}', '{i}')}"
    named = {_OF_EXPERT.sub(".{e}.", name): stored for name, stored in layout.modules.items()}
    modules = (_module(name, stored) for name, stored in named.items())
    more = ["RoPE's pairs are neighbours"] if layout.is_interleaved else []
    more += [f"pooler `{layout.pooler_path}`"] if layout.pooler else []
    return "; ".join((f"`{path}`: {', '.join(modules)}", *more))


def _module(name: str, stored: Stored) -> str:
    notes = [f"{' '.join(stored.members)}, {_ROWS[stored.rows]}"] if len(stored.members) > 1 else []
    notes += ["transposed"] if stored.is_transposed else []
    return f"`{name}` ({'; '.join(notes)})" if notes else f"`{name}`"


def _block(architecture: Architecture) -> Iterator[str]:
    block = architecture.blocks[-1]
    norms = {shape.name: shape.norm for shape in block.norms()}
    places = [words for end, words in _PLACES.items() if any(name.endswith(f"_{end}") for name in norms)]
    yield f"{_norm(next(norm for name, norm in norms.items() if '_' in name))} {' and '.join(places)}"
    if "query" in norms:
        yield f"queries and keys normed {_SPANS[norms['query'].span]}"
    gate = "gated" if block.feed_forward.is_gated else "without a gate"
    beside = ", beside the attention" if block.is_parallel else ""
    experts = block.feed_forward.experts
    chosen = "" if experts is None else f", {experts.num} experts of which a row has {experts.num_per_row}"
    yield f"feed-forward {gate} ({block.feed_forward.activation}){beside}{chosen}"
    if block.residual_scale != 1.0:
        yield "outputs of sub-layers scaled"
    if architecture.shared:
        yield "layers share their weights"


def _norm(norm: Norm) -> str:
    return (
        "RMS norms" if norm.kind == "rms" else "LayerNorms" if norm.has_bias else "LayerNorms without a bias"
    )


def _attention(architecture: Architecture) -> Iterator[str]:
    attentions = [block.attention for block in architecture.blocks]
    num_windows = sum(attention.window is not None for attention in attentions)
    if num_windows:
        ways = " to either side" if attentions[0].sees_all else ""
        yield f"windows{ways} in {num_windows} of {len(attentions)} layers"
    if attentions[0].softcap is not None:
        yield "capped scores"
    yield from _positions(architecture, attentions)


def _positions(architecture: Architecture, attentions: list[Attention]) -> Iterator[str]:
    if (learned := architecture.embedding.positions) is not None:
        yield f"learned positions{f' from row {learned.offset} on' if learned.offset else ''}"
    ropes = Counter(attention.rope for attention in attentions)
    without = ropes.pop(None, 0)
    if not ropes:
        return
    part = max(attention.rotary_dim for attention in attentions)
    notes = [f"of {part} of {attentions[0].head_dim} values"] if part < attentions[0].head_dim else []
    notes += [f"of {len(ropes)} kinds"] if len(ropes) > 1 else []
    notes += [f"but in {without} layers"] if without else []
    yield " ".join(["RoPE", *notes])


def _ends(architecture: Architecture) -> Iterator[str]:
    embedding, head = architecture.embedding, architecture.head
    if embedding.scale != 1.0:
        yield "embeddings scaled"
    if embedding.size != architecture.hidden_size:
        yield f"embeddings of {embedding.size} values, projected"
    if embedding.num_token_types:
        yield f"{embedding.num_token_types} token types"
    if head is None:
        return
    yield "head tied" if head.is_tied else f"own head{' with a bias' if head.has_bias else ''}"
    if head.divisor != 1.0 or head.softcap is not None:
        yield "logits scaled" if head.softcap is None else "logits capped"
