"""Every method that AdapterHub has for encoders, as it is lowered, in one step of the kernels."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from support.gpu.interpreter import DEVICE  # isort: skip

from manyhats.adapters.primitives import LoweredAdapter, PrefixGate
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.sites import Site
from manyhats.adapters.store.opening import open_store
from manyhats.engine.backends.cuda.adapters import bottlenecks, deltas
from manyhats.engine.backends.cuda.adapters.bottlenecks import PlacedNorm
from manyhats.engine.backends.cuda.adapters.gates import find_gates
from manyhats.engine.backends.cuda.record import StreamNorm
from manyhats.engine.model.architecture import COUPLINGS
from support.factories.adapterhub import ENCODER_PRESETS, make_adapterhub
from support.factories.tiny_encoders import make_encoder
from support.gpu.adapters import NOTHING, Served, normal, off, outputs_of, sublayer_of, texts_of
from support.harnesses.engine import load_tiny

NAMES = [*ENCODER_PRESETS, "double_seq_bn"]
LAYER = 1
TEXTS = [(slot, 2 + slot % 3) for slot in range(len(NAMES) + 1)]
"""One of the base and one of each: slot and rows."""
ROW_SLOTS = [slot for slot, size in TEXTS for _ in range(size)]
STARTS = [sum(size for _, size in TEXTS[:text]) for text in range(len(TEXTS) + 1)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    directory = tmp_path_factory.mktemp("methods")
    model = load_tiny(make_encoder(directory / "model", "electra", seed=2))
    adapters: list[LoweredAdapter] = []
    with closing(open_store(directory / "store", model.description, [directory])) as store:
        for seed, name in enumerate(NAMES):
            make_adapterhub(directory / name, model.description, name, seed=seed, scale=0.3)
            record = store.register(Registration(name, Uri(str(directory / name)))).record
            adapters.append(store.lower(record))
    return Served([adapter.deltas for adapter in adapters], model.architecture)


def rows_of(slot: int) -> slice:
    return slice(STARTS[slot], STARTS[slot + 1])


@pytest.mark.parametrize("group", ["qkv", "o", "up", "down"])
def test_every_methods_linears_are_those_of_the_torch_backend(served: Served, group: str) -> None:
    place, step = served.layout.group(LAYER, group), served.step(ROW_SLOTS, starts=STARTS)
    x = normal(1, len(ROW_SLOTS), place.d_in).bfloat16()
    y = normal(2, len(ROW_SLOTS), sum(place.sizes))
    found, work = y.clone(), served.workspace(len(ROW_SLOTS))
    gates = find_gates(step, place, x, work)
    deltas.change_outputs(step, place, x, found, work)
    right = outputs_of(served, LAYER, group, ROW_SLOTS, x, y, STARTS)
    for slot, name in enumerate(["base", *NAMES]):
        rows = rows_of(slot)
        if torch.equal(right[rows], y[rows].double()):
            assert torch.equal(found[rows], y[rows]), name
        else:
            assert off(found[rows] - y[rows], right[rows] - y[rows]) <= 4e-3, name
        own = served.torch.get(slot, NOTHING).at(Site(LAYER, "prefix"), PrefixGate)
        if group == "qkv" and own:
            assert gates is not None
            factors = texts_of(STARTS).gate_of_text(own[0].gate, slot, lambda: x)
            torch.testing.assert_close(gates.factors[slot], factors.expand(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["attention", "feed_forward", "output", *COUPLINGS])
def test_every_methods_bottlenecks_are_those_of_the_torch_backend(served: Served, name: str) -> None:
    site = Site(-1 if name in COUPLINGS else LAYER, name)
    place, num_rows = served.layout.place(site), len(ROW_SLOTS)
    weight = 1 + normal(5, place.size)
    norm = PlacedNorm(StreamNorm.RMS, weight, None, 1e-5)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    r, m = normal(3, num_rows, place.size), normal(4, num_rows, place.size)
    found, step, work = m.clone(), served.step(ROW_SLOTS, starts=STARTS), served.workspace(num_rows)
    bottlenecks.change_output(step, place, r, found, work, norm)
    right = sublayer_of(served, site, ROW_SLOTS, r, m, normed, STARTS)
    changed = (right != m).any(1)
    assert 0 < changed.sum() < num_rows
    assert torch.equal(found[~changed], m[~changed])
    for slot, own in enumerate(["base", *NAMES]):
        rows = changed & (torch.tensor(ROW_SLOTS, device=DEVICE) == slot)
        if rows.any():
            assert off(found[rows] - m[rows], right[rows] - m[rows]) <= 6e-3, own
