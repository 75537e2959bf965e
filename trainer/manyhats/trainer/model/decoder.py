"""The base under autograd, for every family the engine serves: ``engine.model.forward`` under ``TrainingMaths``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.adapters.primitives import KVPrefix, LoweredAdapter, PromptEmbeddings
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.forward import block, embedded, entered, left, logits
from manyhats.engine.model.rotary import RotaryTables
from manyhats.engine.model.weights import BlockWeights, NormWeight
from manyhats.trainer.data.batch import TextBatch, TrainingBatch
from manyhats.trainer.errors import BaseError
from manyhats.trainer.model.deltas import place_deltas
from manyhats.trainer.model.frozen_base import frozen_base
from manyhats.trainer.model.head import Head
from manyhats.trainer.model.maths import TrainingMaths
from manyhats.trainer.model.places import text_places
from manyhats.trainer.model.rows import row_layout


class TrainingDecoder:
    """Token ids in, hidden states or the loss out, differentiable with respect to the adapter's tensors.

    The residual stream, norms, softmax and loss are float32; ``dtype`` is that of the linears' products. The decoder
    holds the base's weights, which it never changes; batch and adapter are arguments. The base may also be an encoder,
    which has hidden states alone.
    """

    def __init__(
        self, model: LoadedModel, *, dtype: torch.dtype, gradient_checkpointing: bool, device: torch.device
    ) -> None:
        self.architecture = model.architecture
        self._device = device
        self._checkpoints = gradient_checkpointing
        self._base = frozen_base(model.architecture, model.weights, dtype, device)
        self._blocks = [_with_norms_on(device, weights) for weights in model.weights.blocks]
        embedding_norm, final_norm = model.weights.embedding_norm, model.weights.final_norm
        self._weights = replace(
            model.weights, embedding_norm=None if embedding_norm is None else _on(device, embedding_norm)
        )
        self._final_norm = None if final_norm is None else _on(device, final_norm)
        self._rotary = RotaryTables(model.architecture)
        self._sites = frozenset(model.architecture.sites())

    @property
    def linear_bytes(self) -> int:
        """Resident bytes of the layers' linears."""
        return self._base.linear_bytes

    def hidden(self, batch: TextBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        """Hidden states as heads read them.

        Args:
            batch: N tokens.
            adapter: None for the base alone.
            dropout: of the input of low-rank deltas, drawn from torch's global generator.

        Returns:
            [N, E] float32.

        Raises:
            BaseError: the base has no place for a delta, or a row is longer than its context.
        """
        return self.pooled(batch, adapter, Pooling.ALL, dropout=dropout)

    def pooled(
        self,
        batch: TextBatch,
        adapter: LoweredAdapter | None,
        pooling: Pooling,
        *,
        skipped_token_id: int | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """What is pooled of each text's hidden states, as the engine pools them.

        Args:
            batch: B texts, N tokens; nothing is shared, unless every token is wanted.
            adapter, dropout: as for ``hidden``.
            pooling: of each text.
            skipped_token_id: trailing tokens with this id do not count for ``LAST``.

        Returns:
            [B, E] float32, or [N, E] with ``ALL``.

        Raises:
            BaseError: as ``hidden``.
        """
        maths = self._begin(batch, adapter, dropout)
        stream = self._stream(maths, batch, adapter)
        places = text_places(batch, _num_ahead(adapter, self.architecture))
        if pooling in (Pooling.FIRST, Pooling.LAST):
            rows = places.first if pooling is Pooling.FIRST else places.last(batch, skipped_token_id)
            return self._left(maths, stream.index_select(0, rows.to(self._device)))
        num_read = 0
        if places.num_ahead and _classifies(adapter):
            num_read = places.num_ahead  # the libraries' models read all rows, whatever they are
        elif places.num_ahead:
            stream = stream.index_select(0, places.tokens.to(self._device))
        hidden = self._left(maths, stream)
        if pooling is Pooling.ALL:
            return hidden
        texts = hidden.split([num_read + length for length in batch.segments])
        return torch.stack([each.mean(0) if pooling is Pooling.MEAN else each.amax(0) for each in texts])

    def loss(self, batch: TrainingBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        """The sum of the cross-entropies of ``batch.targets``, a float32 scalar; arguments as for ``hidden``."""
        head = self._output_head()
        maths = self._begin(batch, adapter, dropout)
        stream = self._stream(maths, batch, adapter)
        hidden = self._left(maths, stream.index_select(0, batch.predictors.to(self._device)))
        return head.loss(hidden, batch.targets.to(self._device), maths.deltas, dropout)

    def logits(self, batch: TextBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        """Logits of every token, [N, V] float32; arguments as for ``hidden``."""
        head = self._output_head()
        maths = self._begin(batch, adapter, dropout)
        hidden = self._left(maths, self._stream(maths, batch, adapter))
        return logits(maths, head.spec, hidden)

    def _output_head(self) -> Head:
        if self._base.head is None:
            raise BaseError(f"{self.architecture.model_type} is an encoder, which continues no text")
        return self._base.head

    def _begin(self, batch: TextBatch, adapter: LoweredAdapter | None, dropout: float) -> TrainingMaths:
        deltas = place_deltas(adapter, self._sites)
        prefix = None if adapter is None else adapter.prefix
        kv_prefix = prefix if isinstance(prefix, KVPrefix) else None
        ahead, num_virtual = _num_ahead(adapter, self.architecture), self._num_virtual(adapter)
        first = 0 if prefix is None else prefix.num_virtual_tokens
        if kv_prefix is not None:
            first += kv_prefix.position_offset
        positions = _with_ahead(batch.positions.cpu() + first, torch.arange(ahead), batch.segments)
        positions = torch.cat((torch.arange(num_virtual), positions))
        types = batch.token_types
        if types is not None:
            types = _with_ahead(types, torch.zeros(ahead, dtype=types.dtype), batch.segments).to(self._device)
        self._check_length(positions)
        angles = self._rotary.at(positions)
        segments = batch.segments[1:] if batch.num_shared else batch.segments
        return TrainingMaths(
            base=self._base,
            deltas=deltas,
            prefix=kv_prefix,
            dropout=dropout,
            positions=positions.to(self._device),
            types=types,
            angles={
                rope: (cos.to(self._device), sin.to(self._device)) for rope, (cos, sin) in angles.items()
            },
            layout=row_layout(
                [length + ahead for length in segments], num_virtual + batch.num_shared, self._device
            ),
        )

    def _check_length(self, positions: Tensor) -> None:
        length = int(positions.max()) + 1 if positions.numel() else 0
        longest = self.architecture.max_context_length
        if length > longest:
            raise BaseError(
                f"a row of {length} positions, including virtual tokens, is longer than the base's context of {longest}"
            )

    def _stream(self, maths: TrainingMaths, batch: TextBatch, adapter: LoweredAdapter | None) -> Tensor:
        """The residual stream after the last layer, [N, D], without virtual tokens but those ahead of each text."""
        x = embedded(maths, self.architecture.embedding, batch.token_ids.to(self._device))
        if adapter is not None and isinstance(adapter.prefix, PromptEmbeddings):
            virtual = adapter.prefix.embeddings.float()
            is_ahead = _num_ahead(adapter, self.architecture) > 0
            x = _with_ahead(x, virtual, batch.segments) if is_ahead else torch.cat((virtual, x))
        stream = entered(maths, self.architecture, self._weights, x)
        checkpoints = self._checkpoints and torch.is_grad_enabled()
        inputs = LayerInputs(len(self._blocks), stream) if checkpoints else None
        for layer, (spec, weights) in enumerate(zip(self.architecture.blocks, self._blocks, strict=True)):
            if inputs is None:
                stream = block(maths, spec, weights, layer, stream)
            else:
                stream = checkpoint(
                    block,
                    maths,
                    spec,
                    weights,
                    layer,
                    inputs.keep(layer, stream),
                    use_reentrant=False,
                    preserve_rng_state=maths.dropout > 0,
                )
        return stream[self._num_virtual(adapter) :]

    def _num_virtual(self, adapter: LoweredAdapter | None) -> int:
        """Virtual tokens that run in the layers once, before all others."""
        return _num_prompt(adapter) - _num_ahead(adapter, self.architecture)

    def _left(self, maths: TrainingMaths, stream: Tensor) -> Tensor:
        return left(maths, self.architecture, self._final_norm, stream)


def _num_prompt(adapter: LoweredAdapter | None) -> int:
    prefix = None if adapter is None else adapter.prefix
    return prefix.num_virtual_tokens if isinstance(prefix, PromptEmbeddings) else 0


def _num_ahead(adapter: LoweredAdapter | None, architecture: Architecture) -> int:
    """Virtual tokens that run in the layers ahead of each text, since they see it."""
    return _num_prompt(adapter) if architecture.attention.sees_all else 0


def _classifies(adapter: LoweredAdapter | None) -> bool:
    head = None if adapter is None else adapter.head
    return head is not None and head.kind is TaskKind.CLASSIFY


def _with_ahead(x: Tensor, ahead: Tensor, segments: Sequence[int]) -> Tensor:
    """Rows of texts, [N, …], each text's behind its own copy of other rows, [P, …]."""
    if not len(ahead):
        return x
    return torch.cat([part for text in x.split(list(segments)) for part in (ahead, text)])


def _with_norms_on(device: torch.device, weights: BlockWeights) -> BlockWeights:
    return replace(weights, norms={name: _on(device, norm) for name, norm in weights.norms.items()})


def _on(device: torch.device, norm: NormWeight) -> NormWeight:
    return NormWeight(norm.weight.to(device), None if norm.bias is None else norm.bias.to(device))


class LayerInputs:
    """Storage for the residual stream before each layer, until the backward pass is over.

    Kept where it was made, each input would lie among the memory that its layer frees, and split it into holes too
    small for the next layer's tensors: the heap would grow at every layer.

    Args:
        num_layers: L.
        residual: [N, D], the first layer's input.
    """

    def __init__(self, num_layers: int, residual: Tensor) -> None:
        self._storage = residual.new_empty(num_layers, *residual.shape).untyped_storage()

    def keep(self, index: int, residual: Tensor) -> Tensor:
        """The input of layer ``index``, stored; the gradient passes through unchanged."""
        kept: Tensor = _Kept.apply(residual, self._storage, index)  # type: ignore[no-untyped-call]
        return kept


class _Kept(torch.autograd.Function):
    """A copy that autograd does not see as a view: functions may not return views of what is written to."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, storage: torch.UntypedStorage, index: int) -> Tensor:
        place: Tensor = residual.new_empty(0)
        place.set_(storage, index * residual.numel(), residual.shape, residual.stride())
        return place.copy_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
