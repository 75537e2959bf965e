"""A model on the CPU, run as ``model.forward`` states it, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from manyhats.adapters import equations
from manyhats.adapters.activations import ACTIVATIONS
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    InputScale,
    LowRank,
    PrefixGate,
)
from manyhats.adapters.sites import EMBEDDING, HEAD, Site
from manyhats.engine.backends.logits import Finished, HostLogits
from manyhats.engine.backends.own_logits import OwnRows, finish_apart, resized
from manyhats.engine.backends.plan import Ints, StepPlan
from manyhats.engine.backends.torch.adapters import TorchAdapter, TorchAdapterSlots
from manyhats.engine.backends.torch.cache import TorchKVCache
from manyhats.engine.backends.torch.choosing import TorchChooser
from manyhats.engine.backends.torch.rotation import rotated
from manyhats.engine.backends.torch.texts import Texts
from manyhats.engine.backends.wants import Wants
from manyhats.engine.backends.warmup import run_one
from manyhats.engine.model.architecture import (
    COUPLINGS,
    Architecture,
    Attention,
    Block,
    FeedForward,
    Group,
    Learned,
    Norm,
    Rope,
)
from manyhats.engine.model.forward import (
    StreamNorm,
    block,
    embedded,
    entered,
    left,
    logits,
    mixed_by_expert,
    scaled_logits,
)
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.rotary import RotaryTables
from manyhats.engine.model.weights import BlockWeights, Linear, Matrix, NormWeight, Weights
from manyhats.engine.progress import Progress

DeltaT = TypeVar("DeltaT")


@dataclass(frozen=True, slots=True, eq=False)
class _Dense:
    """Linears side by side, dequantized: weight [d_out, d_in], bias [d_out] or None, float32."""

    weight: Tensor
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


class TorchModel:
    """``Model`` in plain torch, in float32 on the CPU.

    Each row is computed by itself, since the rounding of a product may depend on its number of rows.

    Args:
        architecture: what is computed.
        weights: dequantized here.
    """

    def __init__(self, architecture: Architecture, weights: Weights) -> None:
        self.architecture = architecture
        self.weights = weights
        self.embedding = weights.embedding
        self._sets: dict[BlockWeights, dict[str, _Dense]] = {}
        for spec, of_block in zip(architecture.blocks, weights.blocks, strict=True):
            if of_block not in self._sets:
                self._sets[of_block] = {
                    group.name: self._dense([of_block.linears[name] for name in group.names])
                    for group in spec.groups()
                }
        self.linears = [self._sets[of_block] for of_block in weights.blocks]
        self.outer = {name: self._dense([linear]) for name, linear in weights.outer.items()}
        self.head = None
        if architecture.head is not None:
            self.head = self.outer.get("lm_head") or self._dense([weights.head])
        self.positions = None if weights.positions is None else weights.positions.float()
        self.token_types = None if weights.token_types is None else weights.token_types.float()
        self.tables = RotaryTables(architecture)

    def _dense(self, linears: list[Linear]) -> _Dense:
        matrices = [_dequantized(linear.matrix) for linear in linears]
        biases = [
            torch.zeros(linear.out_features) if linear.bias is None else linear.bias.float()
            for linear in linears
        ]
        has_bias = any(linear.bias is not None for linear in linears)
        return _Dense(torch.cat(matrices), torch.cat(biases) if has_bias else None)

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """Resident bytes: the layers' linears, and embedding, head and norms."""
        norms = sum(norm.weight.nbytes for norm in self.weights.norms())
        tables = sum(table.nbytes for table in (self.positions, self.token_types) if table is not None)
        head = 0 if self.head is None else self.head.num_bytes
        return {
            "base": sum(dense.num_bytes for groups in self._sets.values() for dense in groups.values()),
            "embeddings": self.embedding.nbytes + head + tables + norms,
        }

    def warm_up(
        self, cache: TorchKVCache, adapters: TorchAdapterSlots, slot: int, progress: Progress
    ) -> None:
        """Nothing is compiled; proves that the model runs."""
        run_one(self, cache, adapters, slot)

    @torch.inference_mode()
    def forward(self, plan: StepPlan, cache: TorchKVCache, adapters: TorchAdapterSlots) -> HostLogits:
        """Runs a step and writes its keys and values."""
        cache.copy_blocks(plan)
        maths = _Step(self, plan, cache, adapters)
        x = embedded(maths, self.architecture.embedding, maths.tensor(plan.token_ids).long())
        if plan.embeddings is not None:
            rows, values = plan.embeddings
            x[maths.tensor(rows).long()] = maths.tensor(values)
        stream = entered(maths, self.architecture, self.weights, x)
        for layer, spec in enumerate(self.architecture.blocks):
            stream = block(maths, spec, self.weights.blocks[layer], layer, stream)
        wanted = stream[maths.tensor(plan.hidden_rows).long()]
        read = left(maths, self.architecture, self.weights.final_norm, wanted)
        if self.architecture.head is None:
            return HostLogits(torch.empty(0, 0), TorchChooser(), read)
        last = stream[maths.tensor(plan.logit_rows).long()]
        hidden = left(maths, self.architecture, self.weights.final_norm, last)
        found = logits(maths, self.architecture.head, hidden)
        own = [OwnRows(each.rows, scaled_logits(each.values, self.architecture.head)) for each in maths.own]
        return _TorchLogits(found, read, own)


class _TorchLogits(HostLogits):
    """Logits on the host; those of tasks with a vocabulary of their own are apart."""

    def __init__(self, values: Tensor, wanted: Tensor, own: list[OwnRows]) -> None:
        super().__init__(values, TorchChooser(), wanted)
        self._own = own

    def finish(self, wants: Wants) -> Finished:
        """Compute everything at once."""
        if not self._own:
            return super().finish(wants)
        rest = super().finish
        size = self.values.shape[1]
        return Finished(finish_apart(self._own, size, self._chooser, wants, lambda part: rest(part).outcome))


class _Step:
    """``Maths`` of one step."""

    def __init__(
        self, model: TorchModel, plan: StepPlan, cache: TorchKVCache, adapters: TorchAdapterSlots
    ) -> None:
        self._model = model
        self._plan = plan
        self._cache = cache
        self._adapters = adapters
        self._cells = self.tensor(plan.cells)
        self._positions = self.tensor(plan.positions).long()
        self._angles = model.tables.at(torch.from_numpy(plan.positions).long())
        self._rows = list(self._rows_by_slot(plan.row_slots))
        self._logit_rows = list(self._rows_by_slot(plan.row_slots[plan.logit_rows]))
        self._texts = Texts(
            plan.query_start, lambda x, gate: self._product(x, _Dense(gate.weight, gate.bias))
        )
        self._prefix_gates: dict[int, Tensor] = {}
        self.own: list[OwnRows] = []

    def tensor(self, values: np.ndarray) -> Tensor:
        """The plan's numbers."""
        return torch.from_numpy(values)

    def embed(self, token_ids: Tensor) -> Tensor:
        # Tokens beyond the table are their adapter's, which replaces what is taken for them.
        table = self._model.embedding
        x = table.index_select(0, token_ids.clamp(max=table.shape[0] - 1)).float()
        for rows, low_rank in self._deltas(EMBEDDING, EmbeddingLowRank):
            x[rows] = equations.embedding(low_rank, token_ids[rows], x[rows])
        for rows, replaced in self._deltas(EMBEDDING, EmbeddingRows):
            x[rows] = equations.embedding(replaced, token_ids[rows], x[rows])
        return x

    def locate(self, learned: Learned) -> Tensor:
        assert self._model.positions is not None
        return self._model.positions[self._positions + learned.offset]

    def token_types(self) -> Tensor:
        assert self._model.token_types is not None
        return self._model.token_types[self.tensor(self._plan.types_of_tokens).long()]

    def enter(self, x: Tensor) -> Tensor:
        for name in COUPLINGS:
            self._bottlenecks(Site(-1, name), x.clone(), x, None)
        if self._plan.normed is not None:
            rows, values = self._plan.normed
            x[self.tensor(rows).long()] = self.tensor(values)
        return x

    def project(self, name: str, x: Tensor) -> Tensor:
        dense = self._model.outer[name]
        y = self._product(x, dense)
        self._change(Site(-1, name), x, y, dense, slice(None))
        return y

    def linears(self, layer: int, group: Group, x: Tensor, rows: Tensor | None = None) -> Tensor:
        dense = self._model.linears[layer][group.name]
        y, start = self._product(x, dense), 0
        for member in group.members:
            columns = slice(start, start + member.d_out)
            start = columns.stop
            self._change(Site(layer, member.name), x, y, dense, columns, rows)
        if group.name == "qkv":
            self._gate_prefixes(layer, x)
        return y

    def _gate_prefixes(self, layer: int, x: Tensor) -> None:
        """Notes by which factors the attention multiplies keys and values of texts' prefixes."""
        self._prefix_gates = {}
        for text, first in enumerate(self._plan.query_start[:-1].tolist()):
            adapter = self._adapters.placed.get(int(self._plan.row_slots[first]))
            for delta in () if adapter is None else adapter.at(Site(layer, "prefix"), PrefixGate):
                self._prefix_gates[text] = self._texts.gate_of_text(delta.gate, text, lambda: x)

    def _change(
        self,
        site: Site,
        x: Tensor,
        y: Tensor,
        dense: _Dense,
        columns: slice,
        rows: Tensor | None = None,
    ) -> None:
        """Gives each row its own adapter's deltas of one linear, in its columns of y.

        ``rows`` says which of the step's rows these are; None for all. Gates are of texts, whose rows are all there.
        """
        for own, rescaling in self._deltas(site, InputScale, rows):
            y[own, columns] = self._product(x[own] * rescaling.scale, dense)[:, columns]
        for own, delta in self._deltas(site, Affine, rows):
            gate = self._texts.gate(delta.gate, own, lambda: x)
            y[own, columns] = equations.affine(y[own, columns], delta, gate)
        for own, low_rank in self._deltas(site, LowRank, rows):
            scale = low_rank.scale * self._texts.gate(low_rank.gate, own, lambda: x)
            y[own, columns] += equations.low_rank(x[own], low_rank.a, low_rank.b, scale)

    def norm(self, x: Tensor, norm: Norm, weight: NormWeight) -> Tensor:
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight.weight
        return y if weight.bias is None else y + weight.bias

    output_norm = norm

    def rotate(self, heads: Tensor, rope: Rope) -> Tensor:
        return rotated(heads, self._angles[rope])

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Each query row by itself over its sequence's cells, which this step's are among."""
        plan, cache = self._plan, self._cache
        spec = self._model.architecture.blocks[layer].attention
        cache.store(layer, self._cells, keys, values)
        out = torch.empty_like(queries)
        for sequence, length in enumerate(plan.context_len.tolist()):
            cells = cache.cells_of(torch.from_numpy(plan.block_tables[sequence]), length)
            first, last = plan.query_start[sequence : sequence + 2].tolist()
            for row in range(first, last):
                seen = spec.seen(length - (last - row), length)
                out[row] = attended(
                    queries[row], *self._read(layer, cells[seen.start : seen.stop], sequence), spec
                )
        return out

    def _read(self, layer: int, cells: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a text's cells, which begin with those of its prefix, times their gate."""
        keys, values = self._cache.read(layer, cells)
        gate = self._prefix_gates.get(text)
        if gate is not None:
            first, last = self._plan.query_start[text : text + 2].tolist()
            num_virtual = len(cells) - (last - first)
            keys[:num_virtual] *= gate[0]
            values[:num_virtual] *= gate[-1]
        return keys, values

    def activate(self, gate_up: Tensor, feed_forward: FeedForward) -> Tensor:
        activation = ACTIVATIONS[feed_forward.activation]
        if not feed_forward.is_gated:
            return activation(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    def mix(self, layer: int, spec: Block, x: Tensor) -> Tensor:
        return mixed_by_expert(self, layer, spec, x)

    def join(self, site: Site, stream: Tensor, output: Tensor, norm: StreamNorm | None) -> Tensor:
        normed = None if norm is None else partial(self.output_norm, norm=norm[0], weight=norm[1])
        unnormed = self._bottlenecks(site, stream, output, normed)
        joined = stream + output
        if normed is None:
            return joined
        found = normed(joined)
        for rows in unnormed:
            found[rows] = joined[rows]
        return found

    def output(self, layer: int, stream: Tensor) -> Tensor:
        found = stream.clone()
        self._bottlenecks(Site(layer, "output"), stream, found, None)
        return found

    def _bottlenecks(
        self, site: Site, stream: Tensor, output: Tensor, normed: Callable[[Tensor], Tensor] | None
    ) -> list[Tensor]:
        """Changes outputs in place; returns the rows that skip the norm of the stream."""
        original = output.clone()  # which the gates of texts' other rows read
        unnormed = []
        for rows, delta in self._deltas(site, Bottleneck):
            read = partial(equations.bottleneck_input, delta, stream, original, normed)
            gate = self._texts.gate(delta.gate, rows, read)
            mask: float | Tensor = 1.0
            if delta.ends is not None:
                mask = self._texts.ends(delta.ends, rows, delta.down.shape[0])
                rows, mask = (part[mask.any(1)] for part in (rows, mask))
            output[rows] = equations.bottleneck(delta, stream[rows], output[rows], normed, gate, mask)
            unnormed += [rows] if delta.skips_norm else []
        return unnormed

    def head(self, hidden: Tensor) -> Tensor:
        """A head of the adapter's own comes before what changes it."""
        assert self._model.head is not None
        found = self._product(hidden, self._model.head)
        for slot, rows in self._logit_rows:
            adapter = self._adapters.placed[slot]
            if HEAD not in adapter.deltas:
                continue
            if adapter.vocab_size is None:
                found[rows] = self._changed(adapter, hidden[rows], found[rows])
            else:
                values = self._changed(adapter, hidden[rows], resized(found[rows], adapter.vocab_size))
                self.own.append(OwnRows(rows.numpy(), values))
        return found

    def _changed(self, adapter: TorchAdapter, hidden: Tensor, found: Tensor) -> Tensor:
        """Logits of rows of one adapter."""
        for own in adapter.at(HEAD, HeadWeight):
            found = self._product(hidden, _Dense(own.weight, own.bias))
        for replaced in adapter.at(HEAD, HeadRows):
            found[:, replaced.ids] = self._product(hidden, _Dense(replaced.rows, replaced.bias))
        for low_rank in adapter.at(HEAD, LowRank):
            found = found + equations.low_rank(hidden, low_rank.a, low_rank.b, low_rank.scale)
        return found

    def _product(self, x: Tensor, dense: _Dense) -> Tensor:
        rows = [dense.weight @ row if dense.bias is None else dense.weight @ row + dense.bias for row in x]
        return torch.stack(rows) if rows else x.new_empty(0, dense.weight.shape[0])

    def _rows_by_slot(self, row_slots: Ints) -> Iterator[tuple[int, Tensor]]:
        """Each adapter's slot and its rows, one by one; an empty slot is the base."""
        for slot in np.unique(row_slots).tolist():
            if slot not in self._adapters.placed:
                continue
            rows = self.tensor(np.flatnonzero(row_slots == slot))
            for own in rows.split(1):
                yield slot, own

    def _deltas(
        self, site: Site, kind: type[DeltaT], among: Tensor | None = None
    ) -> Iterator[tuple[Tensor, DeltaT]]:
        """Rows, each with its adapter's deltas of one kind at a site; or their places ``among`` some of the rows."""
        for slot, rows in self._rows:
            for delta in self._adapters.placed[slot].at(site, kind):
                yield rows if among is None else torch.isin(among, rows).nonzero()[:, 0], delta


def attended(queries: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
    """``softmax(cap(scale · q Kᵀ)) V`` of one row: [H, K] over [T, Hkv, K] twice → [H, K]."""
    grouped = queries.unflatten(0, (attention.num_kv_heads, -1))
    scores = torch.einsum("gqk,tgk->gqt", grouped, keys) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    return torch.einsum("gqt,tgk->gqk", torch.softmax(scores, dim=-1), values).flatten(0, 1)


def _dequantized(matrix: Matrix) -> Tensor:
    return matrix.dequantize() if isinstance(matrix, Nf4Weight) else matrix.float()
