"""The decoder: the forward of one batch, for every family."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from manyhats.engine.backends.backend import FUSED, AdapterSlots, Kernels, KVCache, PackedLinear
from manyhats.engine.backends.batch import Batch
from manyhats.engine.backends.rotary import RotaryTables
from manyhats.engine.model.config import DecoderConfig
from manyhats.engine.model.weights import LayerWeights, Linear, ModelWeights


class _Layer:
    """One layer's weights, packed, and its norms as they are."""

    def __init__(self, weights: LayerWeights, kernels: Kernels[Any, Any]) -> None:
        linears = dict(weights.linears())
        self.fused: dict[str, PackedLinear] = {
            name: kernels.pack([linears[part] for part in parts]) for name, parts in FUSED.items()
        }
        self.input_norm = weights.input_norm
        self.q_norm = weights.q_norm
        self.k_norm = weights.k_norm
        self.attention_output_norm = weights.attention_output_norm
        self.post_attention_norm = weights.post_attention_norm
        self.feed_forward_output_norm = weights.feed_forward_output_norm


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
        self._num_norm_values = (
            sum(n.numel() for layer in weights.layers for n in layer.norms()) + self._norm.numel()
        )
        self._head = kernels.pack([Linear(weights.head, None)])
        self._gate = kernels.silu_mul if config.activation == "silu" else kernels.gelu_tanh_mul
        self._rotary = RotaryTables(config)

    @property
    def linear_bytes(self) -> int:
        """Resident bytes of the layers' linears."""
        return sum(packed.num_bytes for layer in self._layers for packed in layer.fused.values())

    @property
    def embedding_bytes(self) -> int:
        """Resident bytes of embedding, head and norms."""
        tied = self.config.tie_word_embeddings
        embed = 0 if tied else self._embed.numel() * self._embed.element_size()
        return int(embed + self._head.num_bytes + 4 * self._num_norm_values)

    def forward(self, batch: Batch, cache: KVCache, adapters: AdapterSlots) -> Tensor:
        """Runs one batch and writes its keys and values.

        Args:
            batch: N rows.
            cache: of all layers; read and written.
            adapters: the loaded adapters, by slot.

        Returns:
            [M, V] float32, the logits of ``batch.logit_rows``.
        """
        cache.copy_blocks(batch.block_copies)
        angles = self._rotary.at(batch.positions)
        residual = self._embedded(batch, adapters)
        hidden = self._normed(residual, self._layers[0].input_norm)
        for index, layer in enumerate(self._layers):
            out = self._attention(index, hidden, angles[index], batch, cache, adapters)
            out = self._sublayer_output(out, layer.attention_output_norm)
            self._add_bottlenecks("attention", index, residual, out, batch, adapters)
            hidden = self._added(residual, out, layer.post_attention_norm)
            out = self._feed_forward(index, hidden, batch, adapters)
            out = self._sublayer_output(out, layer.feed_forward_output_norm)
            self._add_bottlenecks("feed_forward", index, residual, out, batch, adapters)
            is_last = index + 1 == len(self._layers)
            hidden = self._added(residual, out, self._norm if is_last else self._layers[index + 1].input_norm)
        return self._logits(hidden.index_select(0, batch.logit_rows), batch, adapters)

    def _embedded(self, batch: Batch, adapters: AdapterSlots) -> Tensor:
        """The residual stream as it begins, [N, D]."""
        x = self._embed.index_select(0, batch.token_ids).float()
        if batch.adapter_rows.num_adapters:
            adapters.change_embeddings(batch.token_ids, x, batch.adapter_rows)
        if self.config.embedding_scale != 1.0:
            x.mul_(self.config.embedding_scale)
        if batch.embeddings is not None:
            rows, values = batch.embeddings
            x[rows] = values
        return x

    def _add_bottlenecks(
        self, sublayer: str, layer: int, residual: Tensor, out: Tensor, batch: Batch, adapters: AdapterSlots
    ) -> None:
        """The batch's bottleneck adapters on ``out``; ``residual`` is the stream that entered the sub-layer."""
        if batch.adapter_rows.num_adapters:
            adapters.add_bottlenecks(sublayer, layer, residual, out, batch.adapter_rows)

    def _attention(
        self,
        index: int,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        batch: Batch,
        cache: KVCache,
        adapters: AdapterSlots,
    ) -> Tensor:
        """One layer's attention, its output projection included: [N, D] → [N, D]."""
        kernels, config, layer = self._kernels, self.config, self._layers[index]
        qkv = self._linear("qkv", index, hidden, batch, adapters)
        if layer.q_norm is not None and layer.k_norm is not None:
            num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
            kernels.norm_queries_and_keys(
                qkv, layer.q_norm, layer.k_norm, config.norm_eps, num_queries, num_keys
            )
        cos, sin = angles
        kernels.rotate_and_store(qkv, cos, sin, batch, cache, index, config.num_heads)
        mixed = kernels.attention(
            qkv,
            batch,
            cache,
            index,
            config.num_heads,
            config.attention_scale,
            config.sliding_window[index],
            config.attention_softcap,
        )
        return self._linear("o", index, mixed, batch, adapters)

    def _feed_forward(self, index: int, hidden: Tensor, batch: Batch, adapters: AdapterSlots) -> Tensor:
        """One layer's gated feed-forward: [N, D] → [N, D]."""
        gated = self._gate(self._linear("gate_up", index, hidden, batch, adapters))
        return self._linear("down", index, gated, batch, adapters)

    def _linear(self, name: str, layer: int, x: Tensor, batch: Batch, adapters: AdapterSlots) -> Tensor:
        """One fused linear and the batch's deltas at its sites."""
        y = self._kernels.linear(x, self._layers[layer].fused[name])
        if batch.adapter_rows.num_adapters:
            linear = partial(self._kernels.linear, packed=self._layers[layer].fused[name])
            adapters.add_deltas(name, layer, x, y, batch.adapter_rows, linear)
        return y

    def _sublayer_output(self, out: Tensor, norm: Tensor | None) -> Tensor:
        """A sub-layer's output as it is added to the stream: normed and scaled where the family does that."""
        if norm is not None:
            out = self._kernels.rms_norm(out, norm, self.config.norm_eps)
        scale = self.config.residual_scale
        return out if scale == 1.0 else out.mul_(scale)

    def _normed(self, residual: Tensor, norm: Tensor | None) -> Tensor:
        """The norm of the stream; the stream itself where there is none."""
        return residual if norm is None else self._kernels.rms_norm(residual, norm, self.config.norm_eps)

    def _added(self, residual: Tensor, out: Tensor, norm: Tensor | None) -> Tensor:
        """Residual += out; returns the norm of residual, or residual itself where there is none."""
        if norm is None:
            return residual.add_(out)
        return self._kernels.add_rms_norm(residual, out, norm, self.config.norm_eps)

    def _logits(self, hidden: Tensor, batch: Batch, adapters: AdapterSlots) -> Tensor:
        """Logits of normed rows: [M, D] → [M, V] float32."""
        logits = self._kernels.linear(hidden, self._head)
        if batch.logit_adapter_rows.num_adapters:
            adapters.change_logits(hidden, logits, batch.logit_adapter_rows)
        if self.config.logit_divisor != 1.0:
            logits.div_(self.config.logit_divisor)
        if self.config.logit_softcap is not None:
            self._kernels.softcap(logits, self.config.logit_softcap)
        return logits
