"""Where an adapter may act on the base model: named sites, and what validation must know about a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One place in the decoder's forward: a linear of one layer, such as layer 3's ``q_proj``.

    Besides the linears there are the sub-layers' outputs, ``attention`` and ``feed_forward``. ``layer`` counts
    from 0; it is −1 for places outside the layers (``embed_tokens``, ``lm_head``).
    """

    layer: int
    name: str

    def __str__(self) -> str:
        return self.name if self.layer < 0 else f"layer {self.layer} {self.name}"


EMBEDDING = Site(-1, "embed_tokens")
HEAD = Site(-1, "lm_head")


class WeightSource(Protocol):
    """Reads the base's own weights, for methods whose constants depend on them."""

    def linear(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """Weight [d_out, d_in], dequantized, and bias [d_out] or None, float32."""
        ...


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What text files mean relative to the base's own.

    Attributes:
        fingerprint: the same for files that mean the same; empty if they mean what the base's do.
        notes: what the operator should know.
    """

    fingerprint: str = ""
    notes: tuple[str, ...] = ()


TextCheck = Callable[[Mapping[str, bytes | bytearray]], TextFacts]
"""Says what text files, name → content, mean on a base; raises ``ArtifactError``, ``subject`` the file."""


@dataclass(frozen=True, slots=True)
class BaseDescription:
    """What an adapter is checked against: names, shapes and module paths of the resident base.

    Attributes:
        model_type: Hugging Face ``model_type``, such as ``llama``.
        names: every name this base is known by (alias, hub id, ``--base-name``).
        digest: identifies weights and quantization; part of every KV block's key.
        num_layers: L.
        hidden_size: D.
        vocab_size: V.
        linears: site name → (in features, out features); the same in every layer.
        modules: Hugging Face module path (``model.layers.0.self_attn.q_proj``) → site.
        fused_modules: path of a module that the decoder runs as several linears → their sites, in row order.
        num_kv_heads: Hkv.
        head_dim: K.
        embedding_scale: what the architecture multiplies embeddings by.
        is_tied: whether the output head is the embedding.
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
    modules: Mapping[str, Site]
    fused_modules: Mapping[str, tuple[Site, ...]] = field(default_factory=lambda: MappingProxyType({}))
    num_kv_heads: int = 0
    head_dim: int = 0
    embedding_scale: float = 1.0
    is_tied: bool = True
    has_sliding_window: bool = False
    weights: WeightSource | None = None
    check_text: TextCheck | None = field(default=None, compare=False)
