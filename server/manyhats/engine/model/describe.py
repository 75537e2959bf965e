"""A base as adapters see it."""

from __future__ import annotations

from collections.abc import Iterable

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.adapters.sites import (
    EMBEDDING,
    HEAD,
    POOLER,
    PROJECTION,
    ROUTER,
    BaseDescription,
    ExpertStack,
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
    for layer, block in enumerate(architecture.blocks):
        for path, stored in layout.modules_of(block).items():
            modules[family.path(layer, path)] = tuple(
                Part(Site(architecture.set_of(layer), name), own)
                for name, own in family.rows_of(block, stored).items()
            )
    stacks, renamed = _stacks(family)
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
        linears={name: (linear.d_in, linear.d_out) for name, linear in architecture.linears().items()},
        modules=modules,
        stacks=stacks,
        prefix=layout.prefix,
        aliases={**dict.fromkeys(layout.other_heads, layout.head), **renamed},
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


def _stacks(family: Family) -> tuple[dict[str, ExpertStack], dict[str, str]]:
    """The modules that are all experts of a layer, and other paths of modules → theirs."""
    layout = family.layout
    stacks: dict[str, ExpertStack] = {}
    renamed: dict[str, str] = {}
    for layer, block in enumerate(family.architecture.blocks):
        experts = block.feed_forward.experts
        if experts is None:
            continue
        parameters: dict[str, dict[str, tuple[str, ...]]] = {}
        for below, paths in layout.stacked.items():
            module, _, parameter = layout.path(layer, below).rpartition(".")
            names = [layout.modules[path.format(expert=0)].members[0] for path in paths]
            if names == [ROUTER]:
                renamed[layout.path(layer, below)] = layout.path(layer, paths[0])
            else:
                own = tuple(name.rpartition(".")[2] for name in names)
                parameters.setdefault(module, {})[parameter] = own
        stacks |= {path: ExpertStack(layer, experts.num, held) for path, held in parameters.items()}
    return stacks, renamed
