"""The two ends of a step: from tokens to the initial stream, and from the last one to logits."""

from __future__ import annotations

import torch
from torch import Tensor

from manyhats.adapters.sites import PROJECTION, Site
from manyhats.engine.backends.cuda.activations import scale_logits
from manyhats.engine.backends.cuda.adapters.bottlenecks import change_stream
from manyhats.engine.backends.cuda.adapters.ends import change_embeddings, change_logits
from manyhats.engine.backends.cuda.adapters.group import run_group
from manyhats.engine.backends.cuda.adapters.layout import RecordLayout
from manyhats.engine.backends.cuda.batch import Batch, OwnVocabulary
from manyhats.engine.backends.cuda.buffers import Buffers
from manyhats.engine.backends.cuda.linears.linear import linear
from manyhats.engine.backends.cuda.norms import norm
from manyhats.engine.backends.cuda.weights import CudaWeights
from manyhats.engine.backends.own_logits import OwnRows, resized
from manyhats.engine.model.architecture import COUPLINGS, Architecture, Head


class Ends:
    """The ends of one model's steps.

    Args:
        architecture: the model's.
        weights: its weights.
        layout: of the adapters' records.
        buffers: the model's.
    """

    def __init__(
        self, architecture: Architecture, weights: CudaWeights, layout: RecordLayout, buffers: Buffers
    ) -> None:
        self._architecture = architecture
        self._weights = weights
        self._layout = layout
        self._buffers = buffers

    def enter(self, batch: Batch) -> None:
        """Fill the stream, [N, D]."""
        embedding, weights, buffers = self._architecture.embedding, self._weights, self._buffers
        stream = buffers.stream[: batch.num_rows]
        is_projected = embedding.size != self._architecture.hidden_size
        x = buffers.entering[: batch.num_rows] if is_projected else stream
        self._embed(batch, x)
        if is_projected and embedding.norm is None:
            x = self._project_embeddings(batch, x, stream)
        if embedding.positions is not None:
            assert weights.positions is not None
            x.add_(weights.positions.index_select(0, batch.positions + embedding.positions.offset))
        if embedding.num_token_types:
            assert weights.token_types is not None
            if batch.token_types.numel():
                x.add_(weights.token_types.index_select(0, batch.token_types))
            else:
                x.add_(weights.token_types[0])
        if embedding.norm is not None and weights.embedding_norm is not None:
            norm(x, embedding.norm, weights.embedding_norm, x)
            for name in COUPLINGS:
                place = self._layout.place(Site(-1, name))
                change_stream(batch.adapters, place, x, buffers.adapters)
            _put(x, batch.normed)
        if is_projected and embedding.norm is not None:
            self._project_embeddings(batch, x, stream)

    def _token_ids(self, batch: Batch) -> Tensor:
        """−1 − i is the token of choice i of the step before; 0 stands in where that has none."""
        given, chosen = batch.token_ids, self._buffers.chosen
        before = chosen.index_select(0, (-1 - given).clamp_(min=0)).clamp_(min=0)
        return torch.where(given < 0, before, given)

    def _embed(self, batch: Batch, x: Tensor) -> None:
        """The tokens' vectors times their scale, and those that are given; tokens beyond the table are adapters'."""
        embedding, table = self._architecture.embedding, self._weights.embedding
        rows, token_ids = self._buffers.embedded[: batch.num_rows], self._token_ids(batch)
        torch.index_select(table, 0, token_ids.clamp(max=table.shape[0] - 1), out=rows)
        x.copy_(rows)
        if embedding.scale != 1.0:
            x.mul_(embedding.scale)
        change_embeddings(batch.adapters, self._layout, token_ids, x, embedding.scale)
        _put(x, batch.entering)

    def _project_embeddings(self, batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        weights, buffers = self._weights.outer[PROJECTION.name], self._buffers
        place = self._layout.group(PROJECTION.layer, PROJECTION.name)
        run_group(batch.adapters, place, x.to(torch.bfloat16), weights, y, buffers.linear, buffers.adapters)
        return y

    def _project(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        linear(x.to(torch.bfloat16), self._weights.outer[name], y, self._buffers.linear)
        return y

    def hidden(self, batch: Batch, stream: Tensor) -> Tensor:
        """Rows that are wanted as they leave the model: [H, E] float32."""
        rows = batch.hidden_rows
        left = self._leave(stream, rows)
        # Others follow in the same memory.
        return left.clone() if rows.numel() else left

    def _leave(self, stream: Tensor, rows: Tensor) -> Tensor:
        """Some rows of the stream, normed and projected."""
        count, final = rows.shape[0], self._architecture.final_norm
        last, left = self._buffers.last[:count], self._buffers.left[:count]
        if not count:
            return left
        torch.index_select(stream, 0, rows, out=last)
        if final is not None and self._weights.final_norm is not None:
            norm(last, final, self._weights.final_norm, last)
        if "head_projection" in self._weights.outer:
            return self._project("head_projection", last, left)
        return last

    def logits(self, batch: Batch, stream: Tensor, head: Head) -> tuple[Tensor, list[OwnRows]]:
        """Logits of the logit rows, [M, V] float32, and of those that have a vocabulary of their own."""
        weights, buffers, count = self._weights, self._buffers, batch.logit_rows.shape[0]
        found, read = buffers.logits[:count], buffers.read[:count]
        if not count:
            return found, []
        read.copy_(self._leave(stream, batch.logit_rows))
        assert weights.head is not None
        linear(read, weights.head, found, buffers.linear)
        own = [self._own(each, read, found, head) for each in batch.own]
        change_logits(batch.head_adapters, self._layout, read, found, buffers.adapters)
        scale_logits(found, head)
        return found, own

    def _own(self, own: OwnVocabulary, read: Tensor, found: Tensor, head: Head) -> OwnRows:
        values = resized(found.index_select(0, own.index), own.size)
        hidden = read.index_select(0, own.index)
        change_logits(own.adapters, self._layout, hidden, values, self._buffers.adapters)
        scale_logits(values, head)
        return OwnRows(own.rows, values)


def _put(x: Tensor, entering: tuple[Tensor, Tensor] | None) -> None:
    """Rows that are given as values."""
    if entering is not None:
        rows, values = entering
        x.index_copy_(0, rows.long(), values)
