"""A step's way through the layers: which kernels run, in which order; ``model.forward`` states what they compute."""

from __future__ import annotations

from torch import Tensor

from manyhats.adapters.sites import Site
from manyhats.engine.backends.cuda.activations import activate
from manyhats.engine.backends.cuda.adapters.bottlenecks import (
    NO_NORM,
    PlacedNorm,
    change_output,
    change_stream,
    skip_norms,
)
from manyhats.engine.backends.cuda.adapters.group import run_group
from manyhats.engine.backends.cuda.adapters.layout import RecordLayout
from manyhats.engine.backends.cuda.attention.attend import PrefixGates, attend
from manyhats.engine.backends.cuda.attention.cache import CudaKVCache
from manyhats.engine.backends.cuda.attention.rotary import rotate_and_store
from manyhats.engine.backends.cuda.batch import Batch, Lanes, sees
from manyhats.engine.backends.cuda.buffers import Buffers
from manyhats.engine.backends.cuda.experts.mixture import mix
from manyhats.engine.backends.cuda.norms import add_norm, norm
from manyhats.engine.backends.cuda.record import StreamNorm
from manyhats.engine.backends.cuda.weights import CudaWeights, LayerWeights
from manyhats.engine.model.architecture import Architecture, Around, Block, Norm
from manyhats.engine.model.weights import NormWeight


class Layers:
    """The layers of one step, on the first N rows of the buffers.

    A sub-layer's output is added to the stream where that is read next, in one kernel with the norm.

    Args:
        architecture: the model's.
        weights: its weights.
        batch: the step.
        lanes: of its attention.
        cache: keys and values.
        layout: of the adapters' records.
        buffers: the model's.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: CudaWeights,
        batch: Batch,
        lanes: Lanes,
        cache: CudaKVCache,
        layout: RecordLayout,
        buffers: Buffers,
    ) -> None:
        self._architecture = architecture
        self._weights = weights
        self._batch = batch
        self._lanes = lanes
        self._cache = cache
        self._layout = layout
        self._buffers = buffers
        self._stream = self._rows(buffers.stream)
        self._unadded: tuple[Tensor, float] | None = None  # an output, and what it is multiplied with

    def run(self) -> Tensor:
        """The stream behind the last layer, [N, D] float32."""
        for layer, spec in enumerate(self._architecture.blocks):
            self._block(layer, spec, self._weights.layers[layer])
            self._leave(layer)
        self._add()
        return self._stream

    def _rows(self, buffer: Tensor) -> Tensor:
        return buffer[: self._batch.num_rows]

    def _block(self, layer: int, spec: Block, weights: LayerWeights) -> None:
        attended, fed = Site(layer, "attention"), Site(layer, "feed_forward")
        output, beside = self._rows(self._buffers.output), self._rows(self._buffers.beside)
        x = self._read(spec, "attention", weights)
        self._attention(layer, spec, weights, x, output)
        if not spec.is_parallel:
            self._join(attended, spec, weights, output)
            self._feed_forward(layer, spec, weights, self._read(spec, "feed_forward", weights), output)
            self._join(fed, spec, weights, output)
            return
        if spec.norm_before("feed_forward") != spec.norm_before("attention"):
            x = self._read(spec, "feed_forward", weights)
        self._feed_forward(layer, spec, weights, x, beside)
        self._join(attended, spec, weights, output)
        self._join(fed, spec, weights, beside)

    def _read(self, spec: Block, sublayer: str, weights: LayerWeights) -> Tensor:
        """What a sub-layer reads from the stream, bfloat16."""
        shape, x = spec.norm_before(sublayer), self._rows(self._buffers.x)
        if shape is None:
            self._add()
            x.copy_(self._stream)
            return x
        weight = weights.norms[shape.name]
        if self._unadded is None:
            norm(self._stream, shape.norm, weight, x)
        else:
            add_norm(self._stream, *self._unadded, shape.norm, weight, x)
            self._unadded = None
        return x

    def _add(self) -> None:
        """The bits of ``add_norm``, whose product is rounded before the sum."""
        if self._unadded is not None:
            output, scale = self._unadded
            self._stream.add_(output if scale == 1.0 else output.mul_(scale))
            self._unadded = None

    def _linear(
        self, layer: int, name: str, weights: LayerWeights, x: Tensor, y: Tensor
    ) -> PrefixGates | None:
        """A group's linears, with the rows' adapters: x is rescaled, y is written."""
        place, step, buffers = self._layout.group(layer, name), self._batch.adapters, self._buffers
        return run_group(step, place, x, weights.linears[name], y, buffers.linear, buffers.adapters)

    def _attention(self, layer: int, spec: Block, weights: LayerWeights, x: Tensor, output: Tensor) -> None:
        attention, batch, buffers = spec.attention, self._batch, self._buffers
        inside, behind = spec.attention_groups()
        qkv, queries, mixed = (self._rows(each) for each in (buffers.qkv, buffers.queries, buffers.mixed))
        heads = (-1, attention.num_heads, attention.head_dim)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        gates = self._linear(layer, inside.name, weights, x, qkv)
        rotate_and_store(
            qkv,
            attention,
            self._weights.rotary[attention.rope],
            batch.positions,
            batch.cells,
            weights.norms.get("query"),
            weights.norms.get("key"),
            queries.view(heads),
            keys,
            values,
        )
        attend(
            queries.view(heads),
            keys,
            values,
            batch.tables,
            batch.work[sees(attention)],
            buffers.parts,
            mixed.view(heads),
            attention,
            self._lanes.tiling,
            self._lanes.num,
            gates,
        )
        self._linear(layer, behind.name, weights, mixed, output)

    def _feed_forward(
        self, layer: int, spec: Block, weights: LayerWeights, x: Tensor, output: Tensor
    ) -> None:
        if weights.mixture is not None:
            buffers, step = self._buffers, self._batch.adapters
            assert buffers.mixture is not None
            mix(
                layer, spec, weights.mixture, step, self._layout, x, output, buffers.mixture, buffers.adapters
            )
            return
        first, down = spec.feed_forward_groups()
        gate_up, inside = self._rows(self._buffers.gate_up), self._rows(self._buffers.inside)
        self._linear(layer, first.name, weights, x, gate_up)
        activate(gate_up, spec.feed_forward, inside)
        self._linear(layer, down.name, weights, inside, output)

    def _join(self, site: Site, spec: Block, weights: LayerWeights, output: Tensor) -> None:
        """Notes an output, as the rows' bottlenecks change it, to be added; or the norm of the sum is the stream."""
        self._add()
        around, scale = _around(spec, site), spec.residual_scale
        place, step, work = self._layout.place(site), self._batch.adapters, self._buffers.adapters
        if around.output is not None:
            norm(output, around.output, weights.norms[f"{site.name}_output"], output)
        behind = weights.norms.get(f"{site.name}_stream")
        if place.name in step.acting.sublayers:
            if scale != 1.0:
                output.mul_(scale)
                scale = 1.0
            change_output(step, place, self._stream, output, work, _placed(around.stream, behind))
        if around.stream is None or behind is None:
            self._unadded = output, scale
            return
        before = self._stream
        if place.name in step.acting.norms_skipped:
            before = self._rows(self._buffers.before).copy_(self._stream)
        add_norm(self._stream, output, scale, around.stream, behind, self._stream)
        skip_norms(step, place, before, output, self._stream)

    def _leave(self, layer: int) -> None:
        """Changes what leaves a layer, where bottlenecks act on that."""
        step, name = self._batch.adapters, "output"
        if name in step.acting.sublayers:
            self._add()
            place = self._layout.place(Site(layer, name))
            change_stream(step, place, self._stream, self._buffers.adapters)


def _around(spec: Block, site: Site) -> Around:
    return spec.around_attention if site.name == "attention" else spec.around_feed_forward


def _placed(spec: Norm | None, weight: NormWeight | None) -> PlacedNorm:
    if spec is None or weight is None:
        return NO_NORM
    kind = StreamNorm.LAYER if spec.kind == "layer" else StreamNorm.RMS
    return PlacedNorm(kind, weight.weight, weight.bias, spec.eps)
