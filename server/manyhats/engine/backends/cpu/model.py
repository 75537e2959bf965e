"""A model on the CPU: its weights packed, and its forward operation by operation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from manyhats.engine.backends.cpu.adapters.slots import CpuAdapterSlots
from manyhats.engine.backends.cpu.avx512_bf16 import Avx512Bf16Linear
from manyhats.engine.backends.cpu.batch import Batch
from manyhats.engine.backends.cpu.cache import CpuKVCache
from manyhats.engine.backends.cpu.choosing.ahead import choosing_compiled_ahead
from manyhats.engine.backends.cpu.compile import counted_compilation
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import CpuLinear
from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.backends.warmup import run_one
from manyhats.engine.model.architecture import Architecture, Block
from manyhats.engine.model.rotary import RotaryTables
from manyhats.engine.model.weights import BlockWeights, Weights
from manyhats.engine.progress import LatestProgress, Progress

_Norm = tuple[Tensor, float]
"""Weight and eps."""


class _Layer:
    """One block with its weights, packed, and its norms as they are."""

    def __init__(self, block: Block, weights: BlockWeights, kernels: CpuKernels) -> None:
        self.attention = block.attention
        self.residual_scale = block.residual_scale
        self.fused: dict[str, CpuLinear | Avx512Bf16Linear] = {
            group.name: kernels.pack([weights.linears[name] for name in group.names])
            for group in block.groups()
        }
        norms = {shape.name: (weights.norms[shape.name].weight, shape.norm.eps) for shape in block.norms()}
        self.attention_before = norms.get("attention_before")
        self.query_norm = norms.get("query")
        self.key_norm = norms.get("key")
        self.attention_output = norms.get("attention_output")
        self.feed_forward_before = norms.get("feed_forward_before")
        self.feed_forward_output = norms.get("feed_forward_output")
        self.gate = kernels.gate(block.feed_forward.activation)


class CpuModel:
    """``Model`` on the CPU, as ``model.forward`` has it: an output is added to the stream and normed in one pass.

    It holds weights only: cache, adapters and plan are arguments.

    Raises:
        ModelError: the kernels do not know what a block computes.
    """

    def __init__(self, architecture: Architecture, weights: Weights, kernels: CpuKernels) -> None:
        self.architecture = architecture
        self._kernels = kernels
        self._embed = weights.embedding
        self._layers = [
            _Layer(block, of_block, kernels)
            for block, of_block in zip(architecture.blocks, weights.blocks, strict=True)
        ]
        self._norm = weights.final_norm.weight, architecture.final_norm.eps
        self._num_norm_values = sum(norm.weight.numel() for norm in weights.norms())
        self._head = kernels.pack([weights.head])
        self._rotary = RotaryTables(architecture)

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """Resident bytes: the layers' linears, and embedding, head and norms."""
        is_tied = self.architecture.head.is_tied
        embed = 0 if is_tied else self._embed.numel() * self._embed.element_size()
        return {
            "base": sum(packed.num_bytes for layer in self._layers for packed in layer.fused.values()),
            "embeddings": int(embed + self._head.num_bytes + 4 * self._num_norm_values),
        }

    def warm_up(self, cache: CpuKVCache, adapters: CpuAdapterSlots, slot: int, progress: Progress) -> None:
        """Compiles or loads the kernels, the one that takes longest in a process of its own."""
        compiled = LatestProgress(progress)
        with counted_compilation(compiled), choosing_compiled_ahead(compiled.again) as wait:
            run_one(self, cache, adapters, slot, before_choosing=wait)

    @torch.inference_mode()
    def forward(self, plan: StepPlan, cache: CpuKVCache, adapters: CpuAdapterSlots) -> HostLogits:
        """Runs a step and writes its keys and values."""
        cache.copy_blocks(plan.block_copies)
        batch = Batch.of(plan)
        angles = self._rotary.at(batch.positions)
        residual = self._embedded(batch, adapters)
        hidden = self._normed(residual, self._layers[0].attention_before)
        for index, layer in enumerate(self._layers):
            out = self._attention(index, hidden, angles[layer.attention.rope], batch, cache, adapters)
            out = self._sublayer_output(out, layer.attention_output, layer.residual_scale)
            self._add_bottlenecks("attention", index, residual, out, batch, adapters)
            hidden = self._added(residual, out, layer.feed_forward_before)
            out = self._feed_forward(index, hidden, batch, adapters)
            out = self._sublayer_output(out, layer.feed_forward_output, layer.residual_scale)
            self._add_bottlenecks("feed_forward", index, residual, out, batch, adapters)
            is_last = index + 1 == len(self._layers)
            following = self._norm if is_last else self._layers[index + 1].attention_before
            hidden = self._added(residual, out, following)
        logits = self._logits(hidden.index_select(0, batch.logit_rows), batch, adapters)
        return HostLogits(logits, self._kernels)

    def _embedded(self, batch: Batch, adapters: CpuAdapterSlots) -> Tensor:
        """The residual stream as it begins, [N, D]."""
        x = self._embed.index_select(0, batch.token_ids).float()
        if batch.adapter_rows.num_adapters:
            adapters.change_embeddings(batch.token_ids, x, batch.adapter_rows)
        scale = self.architecture.embedding.scale
        if scale != 1.0:
            x.mul_(scale)
        if batch.embeddings is not None:
            rows, values = batch.embeddings
            x[rows] = values
        return x

    def _add_bottlenecks(
        self,
        sublayer: str,
        layer: int,
        residual: Tensor,
        out: Tensor,
        batch: Batch,
        adapters: CpuAdapterSlots,
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
        cache: CpuKVCache,
        adapters: CpuAdapterSlots,
    ) -> Tensor:
        """One layer's attention, its output projection included: [N, D] → [N, D]."""
        kernels, layer = self._kernels, self._layers[index]
        attention = layer.attention
        qkv = self._linear("qkv", index, hidden, batch, adapters)
        if layer.query_norm is not None and layer.key_norm is not None:
            (query_weight, eps), (key_weight, _) = layer.query_norm, layer.key_norm
            kernels.norm_queries_and_keys(
                qkv, query_weight, key_weight, eps, attention.query_size, attention.key_size
            )
        cos, sin = angles
        kernels.rotate_and_store(qkv, cos, sin, batch, cache, index, attention.num_heads)
        mixed = kernels.attention(
            qkv,
            batch,
            cache,
            index,
            attention.num_heads,
            attention.scale,
            attention.window,
            attention.softcap,
        )
        return self._linear("o", index, mixed, batch, adapters)

    def _feed_forward(self, index: int, hidden: Tensor, batch: Batch, adapters: CpuAdapterSlots) -> Tensor:
        """One layer's gated feed-forward: [N, D] → [N, D]."""
        gated = self._layers[index].gate(self._linear("gate_up", index, hidden, batch, adapters))
        return self._linear("down", index, gated, batch, adapters)

    def _linear(self, name: str, layer: int, x: Tensor, batch: Batch, adapters: CpuAdapterSlots) -> Tensor:
        """One fused linear and the batch's deltas at its sites."""
        y = self._kernels.linear(x, self._layers[layer].fused[name])
        if batch.adapter_rows.num_adapters:
            linear = partial(self._kernels.linear, packed=self._layers[layer].fused[name])
            adapters.add_deltas(name, layer, x, y, batch.adapter_rows, linear)
        return y

    def _sublayer_output(self, out: Tensor, norm: _Norm | None, scale: float) -> Tensor:
        """A sub-layer's output as it is added to the stream: normed and scaled where the family does that."""
        if norm is not None:
            out = self._kernels.rms_norm(out, *norm)
        return out if scale == 1.0 else out.mul_(scale)

    def _normed(self, residual: Tensor, norm: _Norm | None) -> Tensor:
        """The norm of the stream; the stream itself where there is none."""
        return residual if norm is None else self._kernels.rms_norm(residual, *norm)

    def _added(self, residual: Tensor, out: Tensor, norm: _Norm | None) -> Tensor:
        """Residual += out; returns the norm of residual, or residual itself where there is none."""
        return residual.add_(out) if norm is None else self._kernels.add_rms_norm(residual, out, *norm)

    def _logits(self, hidden: Tensor, batch: Batch, adapters: CpuAdapterSlots) -> Tensor:
        """Logits of normed rows: [M, D] → [M, V] float32."""
        logits = self._kernels.linear(hidden, self._head)
        if batch.logit_adapter_rows.num_adapters:
            adapters.change_logits(hidden, logits, batch.logit_adapter_rows)
        head = self.architecture.head
        if head.divisor != 1.0:
            logits.div_(head.divisor)
        if head.softcap is not None:
            self._kernels.softcap(logits, head.softcap)
        return logits
