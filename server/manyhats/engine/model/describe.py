"""A base as adapters see it."""

from __future__ import annotations

from collections.abc import Iterable

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.adapters.sites import (
    EMBEDDING,
    HEAD,
    POOLER,
    PROJECTION,
    BaseDescription,
    Part,
    Site,
    TextCheck,
    WeightSource,
)
from manyhats.engine.model.layout import Family


def describe(
    family: Family,
    *,
    names: Iterable[str],
    digest: str,
    pad_token_id: int | None = None,
    pooling: Pooling = Pooling.LAST,
    weights: WeightSource | None = None,
    check_text: TextCheck | None = None,
    has_pooler: bool = False,
) -> BaseDescription:
    """What adapters are checked against: every linear of every layer is a site, as are embedding and head.

    Args:
        family: the model.
        names: every name this base is known by.
        digest: of weights and quantization.
        pad_token_id: that of its config.
        pooling: of texts, unless a task says otherwise.
        weights: the base's own; None if only its description is available.
        check_text: determines what an adapter's text files mean on this base.
        has_pooler: whether an encoder's files hold a pooler.
    """
    architecture, layout = family.architecture, family.layout
    head = architecture.head
    modules = _outer_modules(family, has_pooler)
    rows = {path: family.rows_of(architecture.blocks[0], stored) for path, stored in layout.modules.items()}
    for layer in range(architecture.num_layers):
        for path, members in rows.items():
            modules[family.path(layer, path)] = tuple(
                Part(Site(architecture.set_of(layer), name), own) for name, own in members.items()
            )
    return BaseDescription(
        model_type=architecture.model_type,
        names=frozenset(names),
        digest=digest,
        pad_token_id=pad_token_id,
        pooling=pooling,
        num_layers=architecture.num_sets,
        shared=architecture.shared,
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        linears={each.name: (each.d_in, each.d_out) for each in architecture.blocks[0].linears()},
        modules=modules,
        prefix=layout.prefix,
        aliases=dict.fromkeys(layout.other_heads, layout.head),
        num_kv_heads=architecture.attention.num_kv_heads,
        head_dim=architecture.attention.head_dim,
        key_order=family.key_order,
        embedding_size=architecture.embedding.size,
        read_size=architecture.read_size,
        embedding_scale=architecture.embedding.scale,
        is_tied=head is not None and head.is_tied,
        has_head_bias=head is not None and head.has_bias,
        kind=TaskKind.EMBED if head is None else TaskKind.GENERATE,
        has_sliding_window=any(block.attention.window is not None for block in architecture.blocks),
        has_pooler=has_pooler,
        pooler_eps=None if architecture.pooler.norm is None else architecture.pooler.norm.eps,
        classifier_pooling=architecture.pooler.pooling,
        weights=weights,
        check_text=check_text,
    )


def _outer_modules(family: Family, has_pooler: bool) -> dict[str, tuple[Part, ...]]:
    """Modules outside the layers, by path."""
    architecture, layout = family.architecture, family.layout
    tokens, width = range(architecture.vocab_size), range(architecture.hidden_size)
    modules: dict[str, tuple[Part, ...]] = {layout.outer(layout.embedding): (Part(EMBEDDING, tokens),)}
    embedding = architecture.embedding
    if architecture.head is not None:
        modules[layout.head] = (Part(HEAD, tokens),)
    if embedding.norm is not None and embedding.size != architecture.hidden_size:
        modules[layout.outer(layout.embedding_projection)] = (Part(PROJECTION, width),)
    if has_pooler:
        modules[layout.pooler_path] = (Part(POOLER, width),)
    return modules
