"""The decoder under autograd, for every family that the engine serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from manyhats.adapters.primitives import KVPrefix, LoweredAdapter, PromptEmbeddings
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.model.rotary import Angles, RotaryTables
from manyhats.trainer.data.batch import TrainingBatch
from manyhats.trainer.errors import BaseError
from manyhats.trainer.model.deltas import PlacedDeltas, place_deltas, with_embedding_deltas
from manyhats.trainer.model.head import Head
from manyhats.trainer.model.layer import FrozenLayer, LayerPass
from manyhats.trainer.model.layer_inputs import LayerInputs
from manyhats.trainer.model.norm import rms_norm
from manyhats.trainer.model.rows import RowLayout, row_layout


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """What one forward runs with, beside its hidden states.

    Attributes:
        num_virtual: virtual tokens that run in the layers, ahead of all others.
        angles: layer by layer.
    """

    num_virtual: int
    angles: list[Angles]
    layout: RowLayout
    deltas: PlacedDeltas
    prefix: KVPrefix | None
    dropout: float

    def of_layer(self, index: int) -> LayerPass:
        """What layer ``index`` runs with."""
        prefix = None if self.prefix is None else (self.prefix.keys[index], self.prefix.values[index])
        return LayerPass(self.angles[index], self.layout, self.deltas, prefix, self.dropout)


class TrainingDecoder:
    """Token ids in, hidden states or the loss out, differentiable with respect to the adapter's tensors.

    The residual stream, norms, softmax and loss are float32; ``dtype`` is that of the linears' products. It holds
    the base's weights, which it never changes; batch and adapter are arguments.
    """

    def __init__(
        self, model: LoadedModel, *, dtype: torch.dtype, gradient_checkpointing: bool, device: torch.device
    ) -> None:
        architecture, weights = model.architecture, model.weights
        self.architecture = architecture
        self._device = device
        self._checkpoints = gradient_checkpointing
        self._embed = weights.embedding.to(device)
        self._layers = [
            FrozenLayer(index, block, weights.blocks[index], dtype, device)
            for index, block in enumerate(architecture.blocks)
        ]
        self._norm = weights.final_norm.weight.to(device)
        head = self._embed if architecture.head.is_tied else weights.head.matrix
        assert isinstance(head, Tensor)  # NF4 is for the blocks' linears
        self._head = Head(head, architecture.head, dtype, device)
        self._rotary = RotaryTables(architecture)
        self._sites = frozenset(architecture.sites())

    @property
    def linear_bytes(self) -> int:
        """Resident bytes of the layers' linears."""
        return sum(layer.linear_bytes for layer in self._layers)

    def hidden(self, batch: TrainingBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        """Hidden states after the final norm.

        Args:
            batch: N tokens.
            adapter: None is the base alone.
            dropout: of the input of low-rank deltas, drawn from torch's global generator.

        Returns:
            [N, D] float32.

        Raises:
            BaseError: a delta that this base has no place for, or a row that is longer than its context.
        """
        deltas = place_deltas(adapter, self._sites)
        return self._normed(self._residual(batch, adapter, deltas, dropout))

    def loss(self, batch: TrainingBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        """The sum of the cross-entropies of ``batch.targets``, a float32 scalar; arguments as of ``hidden``."""
        deltas = place_deltas(adapter, self._sites)
        residual = self._residual(batch, adapter, deltas, dropout)
        hidden = self._normed(residual.index_select(0, batch.predictors.to(self._device)))
        return self._head.loss(hidden, batch.targets.to(self._device), deltas.head, dropout)

    def logits(self, batch: TrainingBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        """[N, V] float32, of every token; arguments as of ``hidden``."""
        deltas = place_deltas(adapter, self._sites)
        hidden = self._normed(self._residual(batch, adapter, deltas, dropout))
        return self._head.logits(hidden, deltas.head)

    def _normed(self, residual: Tensor) -> Tensor:
        return rms_norm(residual, self._norm, self.architecture.final_norm.eps)

    def _residual(
        self, batch: TrainingBatch, adapter: LoweredAdapter | None, deltas: PlacedDeltas, dropout: float
    ) -> Tensor:
        """The residual stream behind the last layer, [N, D]; virtual tokens are gone."""
        prefix = None if adapter is None else adapter.prefix
        virtual = prefix.embeddings.float() if isinstance(prefix, PromptEmbeddings) else None
        residual = self._embedded(batch, deltas)
        if virtual is not None:
            residual = torch.cat((virtual, residual))
        step = self._begin(batch, prefix, deltas, dropout)
        checkpoints = self._checkpoints and torch.is_grad_enabled()
        inputs = LayerInputs(len(self._layers), residual) if checkpoints else None
        for index, layer in enumerate(self._layers):
            if inputs is not None:
                residual = checkpoint(
                    layer.forward,
                    inputs.keep(index, residual),
                    step.of_layer(index),
                    use_reentrant=False,
                    preserve_rng_state=dropout > 0,
                )
            else:
                residual = layer.forward(residual, step.of_layer(index))
        return residual[step.num_virtual :]

    def _begin(
        self,
        batch: TrainingBatch,
        prefix: KVPrefix | PromptEmbeddings | None,
        deltas: PlacedDeltas,
        dropout: float,
    ) -> _Pass:
        kv_prefix = prefix if isinstance(prefix, KVPrefix) else None
        num_virtual = 0 if prefix is None or kv_prefix is not None else prefix.num_virtual_tokens
        first = 0 if prefix is None else prefix.num_virtual_tokens
        if kv_prefix is not None:
            first += kv_prefix.position_offset
        positions = torch.cat((torch.arange(num_virtual), batch.positions.cpu() + first))
        self._check_length(positions)
        segments = batch.segments[1:] if batch.num_shared else batch.segments
        return _Pass(
            num_virtual=num_virtual,
            angles=self._angles_at(positions),
            layout=row_layout(segments, num_virtual + batch.num_shared, self._device),
            deltas=deltas,
            prefix=kv_prefix,
            dropout=dropout,
        )

    def _check_length(self, positions: Tensor) -> None:
        length = int(positions.max()) + 1 if positions.numel() else 0
        longest = self.architecture.max_context_length
        if length > longest:
            raise BaseError(
                f"a row of {length} positions, virtual tokens counted, is longer than the base's context of {longest}"
            )

    def _embedded(self, batch: TrainingBatch, deltas: PlacedDeltas) -> Tensor:
        """The residual stream as it begins, [N, D] float32."""
        token_ids = batch.token_ids.to(self._device)
        embedded = self._embed.index_select(0, token_ids).float()
        embedded = with_embedding_deltas(deltas.embedding, token_ids, embedded)
        scale = self.architecture.embedding.scale
        return embedded if scale == 1.0 else embedded * scale

    def _angles_at(self, positions: Tensor) -> list[Angles]:
        """Layer by layer, on the device."""
        angles = {
            rope: (cos.to(self._device), sin.to(self._device))
            for rope, (cos, sin) in self._rotary.at(positions).items()
        }
        return [angles[block.attention.rope] for block in self.architecture.blocks]
