"""The weights of one decoder as frozen structures: what the checkpoint reader fills and the decoder reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from manyhats.engine.model.nf4 import Nf4Weight

Matrix = Tensor | Nf4Weight
"""[out, in]: dense (float32 or bfloat16) or NF4."""

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of one layer, in the order of the forward."""

NORM_NAMES = (
    "input_norm",
    "q_norm",
    "k_norm",
    "attention_output_norm",
    "post_attention_norm",
    "feed_forward_output_norm",
)
"""The norms that a layer may have, in the order of the forward."""


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """y = x Wᵀ + bias; ``bias`` [out] or None, in the dense dtype."""

    weight: Matrix
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.weight.shape[1])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerWeights:
    """One layer: attention, gated feed-forward, and RMS norms (float32; None where the family has none).

    Attributes:
        input_norm: [D], on the residual stream, of the attention's input.
        post_attention_norm: [D], on the residual stream, of the feed-forward's input.
        attention_output_norm: [D], on the attention's output, before it is added to the stream.
        feed_forward_output_norm: [D], on the feed-forward's output, likewise.
        q_norm: on the queries before their rotation: [K] for each head by itself, or [H·K] over all of them.
        k_norm: on the keys: [K] or [Hkv·K].
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    input_norm: Tensor | None = None
    post_attention_norm: Tensor | None = None
    attention_output_norm: Tensor | None = None
    feed_forward_output_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Name and linear, in the order of ``LINEAR_NAMES``."""
        for name in LINEAR_NAMES:
            yield name, getattr(self, name)

    def norms(self) -> Iterator[Tensor]:
        """The norms that there are."""
        for name in NORM_NAMES:
            norm = getattr(self, name)
            if norm is not None:
                yield norm


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ModelWeights:
    """A whole decoder.

    Attributes:
        embed_tokens: [V, D].
        layers: L of them.
        norm: [D] float32, the final RMS norm.
        lm_head: [V, D]; None where the head is ``embed_tokens``.
    """

    embed_tokens: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Tensor | None = None

    @property
    def head(self) -> Tensor:
        """The output head [V, D], tied or not."""
        return self.embed_tokens if self.lm_head is None else self.lm_head
