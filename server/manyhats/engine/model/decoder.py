"""The decoder: the forward of one batch, for every architecture of the Llama family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyhats.engine.batch import Batch
from manyhats.engine.kernels.interface import FUSED, AdapterSlots, Kernels, KVCache, PackedLinear
from manyhats.engine.model.config import DecoderConfig
from manyhats.engine.model.weights import LayerWeights, Linear, ModelWeights


class _Layer:
    """One layer's weights, packed."""

    def __init__(self, weights: LayerWeights, kernels: Kernels[Any, Any]) -> None:
        linears = dict(weights.linears())
        self.fused: dict[str, PackedLinear] = {
            name: kernels.pack([linears[part] for part in parts]) for name, parts in FUSED.items()
        }
        self.input_norm = weights.input_norm
        self.post_attention_norm = weights.post_attention_norm


class Decoder:
    """Token ids in, logits out. The residual stream, norms, softmax and logits are float32.

    It holds weights only: cache, adapters and batch are arguments.
    """

    def __init__(self, config: DecoderConfig, weights: ModelWeights, kernels: Kernels[Any, Any]) -> None:
        self.config = config
        self._kernels = kernels
        self._embed = weights.embed_tokens
        self._layers = [_Layer(layer, kernels) for layer in weights.layers]
        self._norm = weights.norm
        self._head = kernels.pack([Linear(weights.head, None)])
        self._cos, self._sin = _rotary_table(config)

    @property
    def linear_bytes(self) -> int:
        """Resident bytes of the layers' linears."""
        return sum(packed.num_bytes for layer in self._layers for packed in layer.fused.values())

    @property
    def embedding_bytes(self) -> int:
        """Resident bytes of embedding, head and norms."""
        tied = self.config.tie_word_embeddings
        embed = 0 if tied else self._embed.numel() * self._embed.element_size()
        norms = (2 * self.config.num_layers + 1) * self.config.hidden_size * 4
        return int(embed + self._head.num_bytes + norms)

    def forward(self, batch: Batch, cache: KVCache, adapters: AdapterSlots) -> Tensor:
        """Runs one batch and writes its keys and values.

        Args:
            batch: N rows.
            cache: of all layers; read and written.
            adapters: the loaded adapters, by slot.

        Returns:
            [M, V] float32, the logits of ``batch.logit_rows``.
        """
        kernels, config = self._kernels, self.config
        cache.copy_blocks(batch.block_copies)
        cos = self._cos.index_select(0, batch.positions)
        sin = self._sin.index_select(0, batch.positions)
        residual = self._embed.index_select(0, batch.token_ids).float()
        hidden = kernels.rms_norm(residual, self._layers[0].input_norm, config.norm_eps)
        for index, layer in enumerate(self._layers):
            qkv = self._linear("qkv", index, hidden, batch, adapters)
            kernels.rotate_and_store(qkv, cos, sin, batch, cache, index, config.num_heads)
            mixed = kernels.attention(
                qkv,
                batch,
                cache,
                index,
                config.num_heads,
                config.attention_scale,
                config.sliding_window[index],
            )
            out = self._linear("o", index, mixed, batch, adapters)
            hidden = kernels.add_rms_norm(residual, out, layer.post_attention_norm, config.norm_eps)
            gated = kernels.silu_mul(self._linear("gate_up", index, hidden, batch, adapters))
            out = self._linear("down", index, gated, batch, adapters)
            following = self._layers[index + 1].input_norm if index + 1 < config.num_layers else self._norm
            hidden = kernels.add_rms_norm(residual, out, following, config.norm_eps)
        return kernels.linear(hidden.index_select(0, batch.logit_rows), self._head)

    def _linear(self, name: str, layer: int, x: Tensor, batch: Batch, adapters: AdapterSlots) -> Tensor:
        """One fused linear and the batch's deltas at its sites."""
        y = self._kernels.linear(x, self._layers[layer].fused[name])
        if batch.adapter_rows.num_adapters:
            adapters.add_deltas(name, layer, x, y, batch.adapter_rows)
        return y


def _rotary_table(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's rotary angles, [max_context_length, rotary_dim / 2], scaled.

    Computed once: torch's vectorized cosine may round the last elements of an array differently, and a row's
    result must not depend on its place in the batch.
    """
    positions = torch.arange(config.max_context_length, dtype=torch.float32)
    angles = positions.unsqueeze(1) * torch.tensor(config.rope.inv_freq, dtype=torch.float32)
    scaling = config.rope.attention_scaling
    return angles.cos() * scaling, angles.sin() * scaling
