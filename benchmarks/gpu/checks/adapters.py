"""K7 to K10: what adapters do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from benchmarks.gpu.checks.check import NAN, Check, Place, off
from benchmarks.gpu.model import config_of
from manyhats.adapters import equations
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    BottleneckInput,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    InputScale,
    LoweredAdapter,
    LowRank,
)
from manyhats.adapters.sites import HEAD, Site
from manyhats.engine.backends.cuda.adapters import bottlenecks, deltas, ends
from manyhats.engine.backends.cuda.adapters.layout import LargestSizes
from manyhats.engine.backends.cuda.adapters.slots import CudaAdapterSlots
from manyhats.engine.backends.cuda.adapters.step import StepAdapters, Workspace
from manyhats.engine.backends.cuda.runtime import runtime_on
from manyhats.engine.backends.plan import AdapterRows, int32
from manyhats.engine.backends.torch.adapters import TorchAdapterSlots
from manyhats.engine.model.families.reading import read_family

_SLOTS = (1, 0, 2, 1, 2, 2)
"""Of the rows; the base is among them."""
_LARGEST = LargestSizes(rank=64, bottleneck=64)
_ARENA_BYTES = 64 << 20


class _Served:
    """Adapters in slots 1, 2, …, and what these hold, rounded."""

    def __init__(self, place: Place, adapters: Sequence[Sequence[Delta]]) -> None:
        architecture = read_family(config_of(replace(place.shape, num_layers=1))).architecture
        slots = CudaAdapterSlots(
            architecture, len(adapters) + 1, _ARENA_BYTES, _LARGEST, runtime_on(place.device)
        )
        oracle = TorchAdapterSlots(torch.bfloat16)
        self._held: dict[int, list[Delta]] = {0: []}
        for slot, own in enumerate(adapters, start=1):
            lowered = LoweredAdapter(str(slot), tuple(own))
            slots.place(slot, slots.pack(lowered))
            held = oracle.pack(lowered).deltas
            self._held[slot] = [delta for each in held.values() for delta in each]
        self._slots = slots  # whose memory the records name by its address
        self.layout = slots.layout
        rows = AdapterRows.of(int32(_SLOTS))
        self.step = StepAdapters.of(rows, slots.records, slots.acting(rows))
        self.work = Workspace.of(len(_SLOTS), self.layout, _LARGEST, place.device)
        for field in fields(self.work):
            getattr(self.work, field.name).fill_(NAN)

    def rows(self) -> Iterator[tuple[int, list[Delta]]]:
        """Each row, and what its adapter has."""
        for row, slot in enumerate(_SLOTS):
            yield row, self._held[slot]


def check_deltas(place: Place) -> Iterator[Check]:
    """Low rank at linears side by side, of one rank and of another; factors and offsets; factors of inputs."""
    group = read_family(config_of(place.shape)).architecture.blocks[0].attention_groups()[0]
    query, key, value = group.members
    hidden = query.d_in

    def low_rank(seed: int, name: str, size: int, rank: int) -> LowRank:
        a, b = place.normal(seed, rank, hidden, scale=hidden**-0.5), place.normal(seed + 1, size, rank)
        return LowRank(Site(0, name), a.cpu(), b.cpu(), 0.5)

    first: list[Delta] = [low_rank(1, query.name, query.d_out, 16), low_rank(3, value.name, value.d_out, 5)]
    second: list[Delta] = [
        Affine(Site(0, key.name), 1 + place.normal(5, key.d_out).cpu(), place.normal(6, key.d_out).cpu()),
        low_rank(7, query.name, query.d_out, 33),
    ]
    served = _Served(place, [first, second])
    x = place.normal(9, len(_SLOTS), hidden).bfloat16()
    y = place.normal(10, len(_SLOTS), group.d_out)
    expected = y.double()
    for row, held in served.rows():
        for delta in held:
            assert isinstance(delta, Affine | LowRank)
            columns = _columns(group.names.index(delta.site.name), [m.d_out for m in group.members])
            part = expected[row, columns]
            if isinstance(delta, Affine):
                expected[row, columns] = equations.affine(part, _on(delta, place))
            else:
                a, b = (matrix.to(place.device).double() for matrix in (delta.a, delta.b))
                expected[row, columns] = part + equations.low_rank(x[row].double(), a, b, delta.scale)
    deltas.change_outputs(served.step, served.layout.group(0, group.name), x, y, served.work)
    yield Check("K7, K8 change_outputs", off(y, expected), 4e-3)
    yield from _check_input_scale(place)


def _columns(member: int, sizes: Sequence[int]) -> slice:
    return slice(sum(sizes[:member]), sum(sizes[: member + 1]))


def _on(delta: Affine, place: Place) -> Affine:
    assert delta.scale is not None
    assert delta.offset is not None
    return replace(delta, scale=delta.scale.to(place.device), offset=delta.offset.to(place.device))


def _check_input_scale(place: Place) -> Iterator[Check]:
    inner = place.shape.intermediate_size
    scales = [1 + place.normal(seed, inner).cpu() for seed in (11, 12)]
    served = _Served(place, [[InputScale(Site(0, "down_proj"), scale)] for scale in scales])
    x = place.normal(13, len(_SLOTS), inner)
    expected = x.double()
    for row, held in served.rows():
        for delta in held:
            assert isinstance(delta, InputScale)
            expected[row] *= delta.scale.to(place.device)
    deltas.scale_inputs(served.step, served.layout.group(0, "down"), x)
    yield Check("K8 scale_inputs", off(x, expected), 1e-6)


def check_bottlenecks(place: Place) -> Iterator[Check]:
    """Of two sizes, on the output and on the sum."""
    hidden, site = place.shape.hidden_size, Site(0, "feed_forward")

    def bottleneck(seed: int, size: int, reads: BottleneckInput) -> Bottleneck:
        return Bottleneck(
            site=site,
            input=reads,
            down=place.normal(seed, size, hidden, scale=hidden**-0.5).cpu(),
            down_bias=place.normal(seed + 1, size).cpu(),
            up=place.normal(seed + 2, hidden, size).cpu(),
            up_bias=place.normal(seed + 3, hidden).cpu(),
            activation="gelu",
            scale=torch.tensor([1.5]),
        )

    served = _Served(
        place, [[bottleneck(20, 9, BottleneckInput.OUTPUT)], [bottleneck(30, 33, BottleneckInput.SUM)]]
    )
    r, m = place.normal(40, len(_SLOTS), hidden), place.normal(41, len(_SLOTS), hidden)
    expected = m.cpu().clone()
    for row, held in served.rows():
        for delta in held:
            assert isinstance(delta, Bottleneck)
            wide = replace(delta, down=delta.down.float(), up=delta.up.float())
            expected[row] = equations.bottleneck(wide, r[row].cpu(), expected[row])
    bottlenecks.change_output(served.step, served.layout.place(site), r, m, served.work)
    yield Check("K9 bottleneck", off(m, expected.to(place.device)), 5e-3)


def check_ends(place: Place) -> Iterator[Check]:
    """Own embeddings, and own rows and low rank of the output head."""
    vocab, hidden = place.shape.vocab_size, place.shape.hidden_size
    ids = torch.tensor([9, 4, 30])
    first: list[Delta] = [
        EmbeddingRows(ids, place.normal(50, 3, hidden).cpu()),
        HeadRows(ids, place.normal(51, 3, hidden).cpu(), None),
    ]
    a, b = place.normal(52, vocab, 8).cpu(), place.normal(53, hidden, 8).cpu()
    head_a, head_b = (
        place.normal(54, 8, hidden, scale=hidden**-0.5).cpu(),
        place.normal(55, vocab, 8).cpu(),
    )
    second: list[Delta] = [EmbeddingLowRank(a, b, 0.5), LowRank(HEAD, head_a, head_b, 0.5)]
    served = _Served(place, [first, second])
    tokens = torch.tensor([4, 9, 30, 31, 4, 9])
    embedded = place.normal(56, len(_SLOTS), hidden)
    yield _check_embedding(served, tokens, embedded)
    yield _check_head(served, place.normal(57, len(_SLOTS), hidden), place.normal(58, len(_SLOTS), vocab))


def _check_embedding(served: _Served, tokens: Tensor, embedded: Tensor) -> Check:
    expected = embedded.cpu().clone()
    for row, held in served.rows():
        for delta in held:
            if isinstance(delta, EmbeddingRows | EmbeddingLowRank):
                one = slice(row, row + 1)
                expected[one] = equations.embedding(delta, tokens[one], expected[one])
    found = embedded.clone()
    ends.change_embeddings(served.step, served.layout, tokens.int().to(found.device), found)
    return Check("K10 change_embeddings", off(found.cpu(), expected), 1e-5)


def _check_head(served: _Served, hidden: Tensor, logits: Tensor) -> Check:
    read, expected = hidden.bfloat16(), logits.double().cpu()
    inputs = read.double().cpu()
    for row, held in served.rows():
        for delta in held:
            if isinstance(delta, HeadRows):
                expected[row, delta.ids] = delta.rows.double() @ inputs[row]
            elif isinstance(delta, LowRank):
                expected[row] += equations.low_rank(
                    inputs[row], delta.a.double(), delta.b.double(), delta.scale
                )
    found = logits.clone()
    ends.change_logits(served.step, served.layout, read, found, served.work)
    return Check("K10 change_logits", off(found.cpu(), expected), 4e-3)
