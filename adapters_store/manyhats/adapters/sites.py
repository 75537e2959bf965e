"""Where an adapter may act on the base model: named sites, and what validation must know about a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from manyhats.adapters.heads import Pooling, TaskKind

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One place in the decoder's forward: a linear of one layer, such as layer 3's ``q_proj``.

    Besides the linears there are the sub-layers' outputs, ``attention`` and ``feed_forward``, the ``prefix`` that the
    attention sees, and the layer's ``output``. ``layer`` counts from 0; it is −1 for places outside the layers
    (``embed_tokens``, ``lm_head``, and ``first_coupling``, ``second_coupling`` on the normed embeddings). A mixture of
    experts has its ``router`` and each expert's linears, such as ``experts.3.up_proj``.
    """

    layer: int
    name: str

    @property
    def is_of_mixture(self) -> bool:
        """Whether it is a router, or an expert's linear: there only low-rank deltas act."""
        return self.name == ROUTER or self.name.startswith(_EXPERTS)

    @property
    def kind(self) -> str:
        """Its name, that of experts' linears without the expert: ``experts.*.up_proj``."""
        if not self.name.startswith(_EXPERTS):
            return self.name
        return f"{_EXPERTS}*.{self.name.rpartition('.')[2]}"

    def __str__(self) -> str:
        return self.name if self.layer < 0 else f"layer {self.layer} {self.name}"


ROUTER = "router"
"""The linear that chooses a row's experts."""
_EXPERTS = "experts."


def expert_linear(expert: int, name: str) -> str:
    """The name of an expert's own ``name``, such as ``experts.3.up_proj``."""
    return f"{_EXPERTS}{expert}.{name}"


EMBEDDING = Site(-1, "embed_tokens")
HEAD = Site(-1, "lm_head")
POOLER = Site(-1, "pooler")
PROJECTION = Site(-1, "embedding_projection")


class WeightSource(Protocol):
    """Reads the base's own weights, for methods whose constants depend on them."""

    def linear(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """Weight [d_out, d_in], dequantized, and bias [d_out] or None, float32; of the embedding [V, E]."""
        ...

    def pooler_norm(self) -> tuple[Tensor, Tensor | None]:
        """Weight [D] and bias [D] or None, float32, of the norm behind the pooler."""
        ...


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What text files mean relative to the base's own.

    Attributes:
        fingerprint: the same for files that mean the same; empty if they mean what the base's do.
        notes: what the operator should know.
        num_ids: the ids of added tokens are below; 0 if there are none.
        last_token: the added token with the largest id.
    """

    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    num_ids: int = 0
    last_token: str = ""


TextCheck = Callable[[Mapping[str, bytes | bytearray]], TextFacts]
"""Says what text files, name → content, mean on a base; raises ``ArtifactError``, ``subject`` the file."""


Rows = range | tuple[int, ...]
"""Rows of a stored matrix, in the order in which they are computed."""


@dataclass(frozen=True, slots=True)
class Part:
    """A linear, or a table, and which of a module's output rows are its own."""

    site: Site
    rows: Rows


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """A layer's experts as one module, as transformers 5 has them: each parameter has a matrix of every expert.

    Attributes:
        layer: which.
        num: E.
        parameters: name → the linears of an expert that it holds, one below the other; in the module's order.
    """

    layer: int
    num: int
    parameters: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class BaseDescription:
    """What an adapter is checked against: names, shapes and module paths of the resident base.

    Attributes:
        model_type: Hugging Face ``model_type``, such as ``llama``.
        names: every name this base is known by (alias, hub id, ``--base-name``).
        digest: identifies weights and quantization; part of every KV block's key.
        num_layers: L; where layers share their weights, how many sets of these there are, since files count them.
        shared: for each layer that a token runs through, which of these it is; empty if each is its own.
        hidden_size: D.
        vocab_size: V.
        linears: site name → (in features, out features); the same in every layer that has it.
        modules: path of a module as transformers has it (``model.layers.0.self_attn.q_proj``) → what it computes: one
            linear, or several whose rows it holds; the embedding, or the output head.
        stacks: path of a module → the experts that it is.
        prefix: what the paths of modules begin with, but the head's; files may leave it out.
        aliases: other paths of modules → theirs.
        num_kv_heads: Hkv.
        head_dim: K.
        key_order: the order of a head's values, as indices of a file's; None if it is the same.
        embedding_size: E, of a row of the embedding and of the output head; D unless a base projects between them.
        read_size: of a row of hidden values as heads read it; 0 is E.
        embedding_scale: what the architecture multiplies embeddings by.
        is_tied: whether the output head is the embedding.
        has_pooler: whether an encoder's files hold a pooler: what is in front of a classifier.
        pooler_eps: of the norm behind it; None if the family has none.
        classifier_pooling: what an encoder's classifiers of texts read: the first row, or the mean of all.
        has_head_bias: whether the output head adds a bias.
        kind: what it does with a text by itself: it generates, or it is read.
        pooling: of a text's hidden values, unless a task says otherwise.
        pad_token_id: that of its config; None for none.
        has_sliding_window: whether some layer attends only to the latest positions.
        weights: the base's own weights; None if only the description is available.
        check_text: says what an artifact's text files mean on this base; None if its tokenizer is not available.
    """

    model_type: str
    names: frozenset[str]
    digest: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    linears: Mapping[str, tuple[int, int]]
    modules: Mapping[str, tuple[Part, ...]]
    stacks: Mapping[str, ExpertStack] = field(default_factory=lambda: MappingProxyType({}))
    prefix: str = "model."
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    num_kv_heads: int = 0
    head_dim: int = 0
    key_order: tuple[int, ...] | None = None
    embedding_size: int = 0
    read_size: int = 0
    embedding_scale: float = 1.0
    shared: tuple[int, ...] = ()
    is_tied: bool = True
    has_head_bias: bool = False
    has_pooler: bool = False
    pooler_eps: float | None = None
    classifier_pooling: Pooling = Pooling.FIRST
    kind: TaskKind = TaskKind.GENERATE
    pooling: Pooling = Pooling.LAST
    pad_token_id: int | None = None
    has_sliding_window: bool = False
    weights: WeightSource | None = None
    check_text: TextCheck | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "embedding_size", self.embedding_size or self.hidden_size)
        object.__setattr__(self, "read_size", self.read_size or self.embedding_size)

    def for_reading(self) -> BaseDescription:
        """The same for a task that reads a text, whose models have no output head."""
        modules = {path: parts for path, parts in self.modules.items() if parts[0].site != HEAD}
        return replace(self, modules=modules, is_tied=False, has_head_bias=False)

    @property
    def depth(self) -> int:
        """How many layers a token runs through."""
        return len(self.shared) or self.num_layers

    def module_of(self, path: str) -> str | None:
        """The path under which ``modules`` has a module that a file names; None if it is none of this base's."""
        if path in self.modules:
            return path
        return next((each for each in self._known_as(path) if each in self.modules), None)

    def stack_of(self, path: str) -> str | None:
        """The same of ``stacks``."""
        return next((each for each in self._known_as(path) if each in self.stacks), None)

    def _known_as(self, path: str) -> tuple[str, ...]:
        outer = self.prefix.partition(".")[0]  # what a model without a head leaves out
        known = (path, self.prefix + path, f"{outer}.{path}")
        return (*known, *(self.aliases[each] for each in known if each in self.aliases))

    def spellings(self, site: Site) -> tuple[str, ...]:
        """What files may call the embedding or the output head; none if the base has none."""
        path = self.path_of(site)
        outer = self.prefix.partition(".")[0]
        others = (path.removeprefix(self.prefix), path.removeprefix(f"{outer}."))
        renamed = (other for other, own in self.aliases.items() if own == path)
        return tuple(dict.fromkeys((path, *others, *renamed))) if path else ()

    def path_of(self, site: Site) -> str:
        """The path of the embedding or of the output head; empty if the base has none."""
        return next((path for path, parts in self.modules.items() if parts[0].site == site), "")
