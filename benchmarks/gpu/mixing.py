"""Part D: attention beside torch's over the same keys and values, low-rank deltas beside gathered products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.model import config_of, random_lora
from benchmarks.gpu.paged import BLOCK, AttentionStep, Chunk, Texts, num_lanes_of
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale, Shape
from benchmarks.gpu.timing import Timer
from manyhats.adapters.primitives import LoweredAdapter, LowRank
from manyhats.engine.backends.cuda.adapters import deltas
from manyhats.engine.backends.cuda.adapters.layout import LargestSizes, RecordLayout
from manyhats.engine.backends.cuda.adapters.slots import CudaAdapterSlots
from manyhats.engine.backends.cuda.adapters.step import StepAdapters, Workspace
from manyhats.engine.backends.cuda.runtime import runtime_on
from manyhats.engine.backends.plan import AdapterRows, int32
from manyhats.engine.model.architecture import Architecture, Attention
from manyhats.engine.model.families.reading import read_family

_MOST_COPIES = 16
_OF_FREE = 0.8
"""Of the free memory, what one case may take."""


def run(out: Recorder, scale: Scale) -> None:
    """Decodes, prompts, then adapters."""
    device = torch.device(scale.device)
    attention = _architecture(scale.shape, 1).attention
    timer = Timer(device, scale.repeats)
    for rows, length in scale.contexts:
        with out.going_on(f"attention of {rows} × {length}"):
            _attention(out, scale, timer, attention, [length] * rows, 1)
    for length in scale.prefills:
        with out.going_on(f"attention of a prompt of {length}"):
            _attention(out, scale, timer, attention, [length], length)
    for rank in scale.ranks:
        for count in scale.adapter_counts:
            if out.is_late:
                return
            with out.going_on(f"deltas of {count} adapters of rank {rank}"):
                _deltas(out, scale, timer, count, rank)


def _architecture(shape: Shape, num_layers: int) -> Architecture:
    return read_family(config_of(replace(shape, num_layers=num_layers))).architecture


def _attention(
    out: Recorder, scale: Scale, timer: Timer, attention: Attention, lengths: list[int], num_queries: int
) -> None:
    """Each text's last rows; the texts are many enough not to stay in a cache."""
    if out.is_late:
        return
    device = torch.device(scale.device)
    num_bytes = 4 * sum(lengths) * attention.key_size
    if num_bytes > _OF_FREE * _free_bytes(device):
        out.lacks(f"attention of {len(lengths)} × {lengths[0]}: {num_bytes / 1e9:.0f} GB")
        return
    count = max(1, min(_MOST_COPIES, -(-scale.rotated_bytes // num_bytes)))
    texts = [Texts.make(attention, lengths, num_queries, device) for _ in range(count)]
    chunks: list[Chunk] = [(index, length - num_queries, length) for index, length in enumerate(lengths)]
    lanes = num_lanes_of(attention, device)
    steps = [AttentionStep(each, chunks, lanes) for each in texts]
    ways: dict[str, list[Callable[[], object]]] = {
        "own": [step.launch for step in steps],
        "sdpa": [partial(_sdpa, each, num_queries) for each in texts],
    }
    flops = (
        4 * attention.query_size * sum(num_queries * (2 * length - num_queries + 1) / 2 for length in lengths)
    )
    for by, calls in ways.items():
        timed = timer.time(calls)
        out.record(
            "attention",
            by=by,
            texts=len(lengths),
            length=lengths[0],
            rows=num_queries,
            us=1e6 * timed.seconds,
            gb_per_s=num_bytes / timed.seconds / 1e9,
            tflop_per_s=flops / timed.seconds / 1e12,
            is_graph=timed.is_graph,
        )


def _free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1e9


def _sdpa(texts: Texts, num_queries: int) -> Tensor:
    """Torch's, whose texts must have one length and lie in a row."""
    size, length = len(texts.lengths), texts.lengths[0]
    per_text = -(-length // BLOCK) * BLOCK
    keys, values = (
        part.view(size, per_text, *part.shape[2:])[:, :length].transpose(1, 2)
        for part in (texts.keys, texts.values)
    )
    queries = (
        torch.stack(texts.queries).transpose(1, 2) if size > 1 else texts.queries[0][None].transpose(1, 2)
    )
    scale = texts.attention.scale
    return functional.scaled_dot_product_attention(
        queries, keys, values, is_causal=num_queries > 1, scale=scale, enable_gqa=True
    )


def _deltas(out: Recorder, scale: Scale, timer: Timer, count: int, rank: int) -> None:
    """Those of all linears of a layer, of as many rows as adapters, on layers enough not to stay in a cache."""
    device = torch.device(scale.device)
    architecture = _architecture(scale.shape, 1)
    lora = random_lora(architecture, rank, "measured")
    layer_bytes = sum(each.a.nbytes + each.b.nbytes for each in lora.deltas if isinstance(each, LowRank))
    num_layers = max(1, min(_MOST_COPIES, -(-scale.rotated_bytes // (count * layer_bytes))))
    architecture = _architecture(scale.shape, num_layers)
    lora = LoweredAdapter(
        "measured",
        tuple(
            replace(each, site=replace(each.site, layer=layer))
            for layer in range(num_layers)
            for each in lora.deltas
            if isinstance(each, LowRank)
        ),
    )
    total = count * num_layers * layer_bytes
    if 2.2 * total > _OF_FREE * _free_bytes(device):
        out.lacks(f"deltas of {count} adapters of rank {rank}: {2.2 * total / 1e9:.0f} GB")
        return
    ways = {
        "own": _own(architecture, lora, count, rank, device),
        "gather + bmm": _gathered(architecture, lora, count, device),
    }
    for by, calls in ways.items():
        timed = timer.time(calls)
        out.record(
            "deltas",
            by=by,
            adapters=count,
            rank=rank,
            us=1e6 * timed.seconds,
            gb_per_s=count * layer_bytes / timed.seconds / 1e9,
            is_graph=timed.is_graph,
        )


def _own(
    architecture: Architecture, lora: LoweredAdapter, count: int, rank: int, device: torch.device
) -> list[Callable[[], object]]:
    """One call a layer."""
    largest = LargestSizes(rank=rank, bottleneck=16)
    slots = CudaAdapterSlots(architecture, count + 1, 0, largest, runtime_on(device))
    packed = slots.pack(lora)
    slots = CudaAdapterSlots(
        architecture, count + 1, count * (packed.numbers.numel() + 256), largest, runtime_on(device)
    )
    for slot in range(1, count + 1):
        slots.place(slot, packed)
    rows = AdapterRows.of(int32(range(1, count + 1)))
    step = StepAdapters.of(rows, slots.records, slots.acting(rows))
    work = Workspace.of(count, slots.layout, largest, device)
    inputs = _inputs(slots.layout, count, device)

    def layer(index: int) -> None:
        assert slots  # whose memory the records name by its address
        for name, (x, y) in inputs.items():
            deltas.change_outputs(step, slots.layout.group(index, name), x, y, work)

    return [partial(layer, index) for index in range(architecture.num_layers)]


def _inputs(layout: RecordLayout, rows: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each group: [rows, K] and [rows, N]."""
    return {
        name: (
            torch.randn(rows, group.d_in, device=device).bfloat16(),
            torch.zeros(rows, group.d_out, device=device),
        )
        for name, group in layout.groups.items()
    }


def _gathered(
    architecture: Architecture, lora: LoweredAdapter, count: int, device: torch.device
) -> list[Callable[[], object]]:
    """Each row's matrices gathered from those of all adapters, then batched products; one call a layer."""
    linears = [each for each in lora.deltas if isinstance(each, LowRank)]
    slots = torch.arange(count, device=device)
    stacked = [
        tuple(
            matrix.to(device).expand(count, -1, -1).contiguous() for matrix in (each.a, each.b.T.contiguous())
        )
        for each in linears
    ]
    per_layer = len(linears) // architecture.num_layers
    inputs = [
        (
            torch.randn(count, 1, each.a.shape[1], device=device).bfloat16(),
            torch.zeros(count, 1, each.b.shape[0], device=device).bfloat16(),
        )
        for each in linears[:per_layer]
    ]

    def layer(index: int) -> None:
        own = islice(cycle(stacked), index * per_layer, (index + 1) * per_layer)
        for (x, y), (a, b) in zip(inputs, own, strict=True):
            inside = torch.bmm(x, a.index_select(0, slots).transpose(1, 2))
            torch.baddbmm(y, inside, b.index_select(0, slots), out=y)

    return [partial(layer, index) for index in range(architecture.num_layers)]
