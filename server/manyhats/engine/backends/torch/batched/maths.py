"""``Maths`` of one step, on all rows at once.

The stream, norms' sums and logits are float32; what linears and the attention read has the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from manyhats.adapters import equations
from manyhats.adapters.activations import ACTIVATIONS
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    InputScale,
    LowRank,
    PrefixGate,
)
from manyhats.adapters.sites import EMBEDDING, Site
from manyhats.engine.backends.own_logits import OwnRows
from manyhats.engine.backends.torch.batched.adapters import DeviceAdapterSlots
from manyhats.engine.backends.torch.batched.attention import AttentionPlan
from manyhats.engine.backends.torch.batched.batch import Batch
from manyhats.engine.backends.torch.batched.heads import changed_head
from manyhats.engine.backends.torch.batched.rows import Rows
from manyhats.engine.backends.torch.batched.texts import DeviceTexts
from manyhats.engine.backends.torch.batched.weights import DeviceWeights
from manyhats.engine.backends.torch.cache import TorchKVCache
from manyhats.engine.backends.torch.rotation import rotated
from manyhats.engine.model.architecture import (
    COUPLINGS,
    Attention,
    Block,
    FeedForward,
    Group,
    Learned,
    Norm,
    Rope,
)
from manyhats.engine.model.forward import StreamNorm, routed
from manyhats.engine.model.weights import NormWeight

DeltaT = TypeVar("DeltaT")


class BatchedMaths:
    """See ``Maths``.

    Args:
        weights: of the base.
        batch: the step's.
        cache: that it reads and writes.
        slots: of its adapters.
    """

    def __init__(
        self, weights: DeviceWeights, batch: Batch, cache: TorchKVCache, slots: DeviceAdapterSlots
    ) -> None:
        self._weights = weights
        self._batch = batch
        self._cache = cache
        self._adapters = {slot: slots.placed[slot] for slot in batch.rows if slot in slots.placed}
        self._texts = DeviceTexts(batch.plan.query_start, batch.device)
        self._angles = weights.angles(batch.positions)
        self._attention: dict[tuple[int | None, bool], AttentionPlan] = {}
        self._prefix_gates: dict[int, Tensor] = {}
        self.own: list[OwnRows] = []

    def embed(self, token_ids: Tensor) -> Tensor:
        """Float32."""
        # Tokens beyond the table are their adapter's, which replaces what is taken for them.
        table = self._weights.embedding
        x = table.index_select(0, token_ids.clamp(max=table.shape[0] - 1)).float()
        for rows, low_rank in self._of_kind(EMBEDDING, EmbeddingLowRank):
            rows.put(x, equations.embedding(low_rank, rows.of(token_ids), rows.of(x)))
        for rows, replaced in self._of_kind(EMBEDDING, EmbeddingRows):
            rows.put(x, equations.embedding(replaced, rows.of(token_ids), rows.of(x)))
        return x

    def locate(self, learned: Learned) -> Tensor:
        """Float32."""
        assert self._weights.positions is not None
        return self._weights.positions.index_select(0, self._batch.positions + learned.offset)

    def token_types(self) -> Tensor:
        """Float32."""
        assert self._weights.token_types is not None
        return self._weights.token_types.index_select(0, self._batch.token_types)

    def enter(self, x: Tensor) -> Tensor:
        """Float32."""
        for name in COUPLINGS:
            self._bottlenecks(Site(-1, name), x.clone(), x, None)
        self._batch.put(x, self._batch.plan.normed)
        return x

    def project(self, name: str, x: Tensor) -> Tensor:
        """Float32."""
        return self._linear(Site(-1, name), self._input(x)).float()

    def linears(self, layer: int, group: Group, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """The compute dtype; float32 where the stream takes it."""
        x = self._input(x)
        outputs = [self._linear(Site(layer, member.name), x) for member in group.members]
        if group.name == "qkv":
            self._gate_prefixes(layer, x)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _linear(self, site: Site, x: Tensor) -> Tensor:
        """One linear, with each row's own deltas."""
        product, is_wide = self._weights.linear(site)
        y = product(self._scaled(site, x))
        y = y.float() if is_wide else y
        for rows, deltas in self._deltas(site):
            for delta in deltas:
                if isinstance(delta, Affine):
                    gate = self._texts.gate(delta.gate, rows, lambda: x)
                    rows.put(y, equations.affine(rows.of(y), delta, gate))
            for delta in deltas:
                if isinstance(delta, LowRank):
                    scale = delta.scale * self._texts.gate(delta.gate, rows, lambda: x)
                    rows.add(y, equations.low_rank(rows.of(x), delta.a, delta.b, scale))
        return y

    def _scaled(self, site: Site, x: Tensor) -> Tensor:
        """A linear's input, with the rows that an adapter rescales."""
        scaled = x
        for rows, delta in self._of_kind(site, InputScale):
            scaled = x.clone() if scaled is x else scaled
            rows.put(scaled, rows.of(scaled) * delta.scale)
        return scaled

    def _gate_prefixes(self, layer: int, x: Tensor) -> None:
        """Notes by which factors the attention multiplies keys and values of texts' prefixes."""
        self._prefix_gates = {}
        starts, slots = self._batch.plan.query_start, self._batch.plan.row_slots
        for slot, adapter in self._adapters.items():
            for delta in adapter.at(Site(layer, "prefix"), PrefixGate):
                for text in (slots[starts[:-1]] == slot).nonzero()[0].tolist():
                    self._prefix_gates[text] = self._texts.gate_of_text(delta.gate, text, lambda: x)

    def norm(self, x: Tensor, norm: Norm, weight: NormWeight) -> Tensor:
        """The compute dtype."""
        return self._input(self.output_norm(x, norm, weight))

    def output_norm(self, x: Tensor, norm: Norm, weight: NormWeight) -> Tensor:
        """Float32."""
        x = x.float()
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight.weight
        return y if weight.bias is None else y + weight.bias

    def rotate(self, heads: Tensor, rope: Rope) -> Tensor:
        """The compute dtype, from angles in float32."""
        return self._input(rotated(heads.float(), self._angles[rope]))

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The compute dtype."""
        spec = self._weights.architecture.blocks[layer].attention
        self._cache.store(layer, self._batch.cells, keys, values)
        gates = self._prefix_gates
        num_virtual = self._batch.num_virtual if gates else {}
        plan = self._attention_plan(spec)
        return plan.attend(layer, self._input(queries), self._cache, spec, gates, num_virtual)

    def _attention_plan(self, spec: Attention) -> AttentionPlan:
        """Layers that see the same share it."""
        key = spec.window, spec.sees_all
        if key not in self._attention:
            batch = self._batch
            dtype = self._weights.dtype
            self._attention[key] = AttentionPlan(batch.plan, batch.tables, self._cache, spec, dtype)
        return self._attention[key]

    def activate(self, gate_up: Tensor, feed_forward: FeedForward) -> Tensor:
        """The compute dtype."""
        activation = ACTIVATIONS[feed_forward.activation]
        if not feed_forward.is_gated:
            return activation(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    def mix(self, layer: int, spec: Block, x: Tensor) -> Tensor:
        """Runs every expert on every row, so that no number of rows must be known."""
        experts = spec.feed_forward.experts
        assert experts is not None
        chosen, shares = routed(self.linears(layer, spec.router(experts), x).float(), experts)
        of_expert = shares.new_zeros(x.shape[0], experts.num).scatter_(1, chosen, shares)
        is_sent = torch.zeros_like(of_expert, dtype=torch.bool).scatter_(1, chosen, True)
        total = torch.zeros_like(x, dtype=torch.float32)
        for expert in range(experts.num):
            first, down = spec.feed_forward_groups(expert)
            inside = self.activate(self.linears(layer, first, x), spec.feed_forward)
            output = self.linears(layer, down, inside).float() * of_expert[:, expert : expert + 1]
            total = total + output.masked_fill(~is_sent[:, expert : expert + 1], 0.0)
        return total

    def join(self, site: Site, stream: Tensor, output: Tensor, norm: StreamNorm | None) -> Tensor:
        """Float32."""
        normed = None if norm is None else partial(self.output_norm, norm=norm[0], weight=norm[1])
        unnormed = self._bottlenecks(site, stream, output, normed)
        joined = stream + output
        if normed is None:
            return joined
        found = normed(joined)
        for rows in unnormed:
            rows.put(found, rows.of(joined))
        return found

    def output(self, layer: int, stream: Tensor) -> Tensor:
        """Float32."""
        found = stream.clone()
        self._bottlenecks(Site(layer, "output"), stream, found, None)
        return found

    def _bottlenecks(
        self, site: Site, stream: Tensor, output: Tensor, normed: Callable[[Tensor], Tensor] | None
    ) -> list[Rows]:
        """Changes outputs in place; returns the rows that skip the norm of the stream."""
        found = list(self._of_kind(site, Bottleneck))
        original = output.clone() if found else output  # which the gates of texts' other rows read
        unnormed = []
        for of_adapter, delta in found:
            rows = of_adapter
            mask: float | Tensor = 1.0
            read = partial(equations.bottleneck_input, delta, stream, original, normed)
            if delta.ends is not None:
                rows, mask = self._texts.ends(delta.ends, of_adapter, delta.down.shape[0])
            gate = self._texts.gate(delta.gate, rows, read)
            changed = equations.bottleneck(delta, rows.of(stream), rows.of(output), normed, gate, mask)
            rows.put(output, changed)
            unnormed += [rows] if delta.skips_norm else []
        return unnormed

    def head(self, hidden: Tensor) -> Tensor:
        """Float32; a head of the adapter's own comes before what changes it."""
        head = self._weights.head
        assert head is not None
        hidden = self._input(hidden)
        found = head.wide(hidden)
        for slot, rows in self._batch.logit_rows_of.items():
            adapter = self._adapters.get(slot)
            changed = None if adapter is None else changed_head(adapter, rows.of(hidden), rows.of(found))
            if adapter is None or changed is None:
                continue
            if adapter.vocab_size is None:
                rows.put(found, changed)
            else:
                self.own.append(OwnRows(rows.host, changed))
        return found

    def _input(self, x: Tensor) -> Tensor:
        return x.to(self._weights.dtype)

    def _deltas(self, site: Site) -> Iterator[tuple[Rows, Sequence[Delta]]]:
        """Rows, and what their adapter does at a site."""
        for slot, adapter in self._adapters.items():
            deltas = adapter.deltas.get(site)
            if deltas:
                yield self._batch.rows[slot], deltas

    def _of_kind(self, site: Site, kind: type[DeltaT]) -> Iterator[tuple[Rows, DeltaT]]:
        for rows, deltas in self._deltas(site):
            for delta in deltas:
                if isinstance(delta, kind):
                    yield rows, delta
