"""Every method of every format, as it is lowered, in one step of the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manyhats.adapters.primitives import InputScale
from manyhats.adapters.sites import Site
from manyhats.engine.backends.cuda.adapters import bottlenecks, deltas
from manyhats.engine.model.architecture import SUBLAYERS
from support.factories.every_method import PLAIN, Sizes
from support.factories.tiny_models import make_checkpoint
from support.gpu.adapters import NOTHING, Served, normal, off, outputs_of, sublayer_of
from support.harnesses.engine import load_tiny
from support.oracles.peft import read_lowered

NAMES = [name for name in PLAIN if name != "adapterhub-prefix"]
"""All but one that is a pickle."""
LAYER = 0
ROW_SLOTS = [*range(len(NAMES) + 1)]
"""A row of the base, and one of each."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    directory = tmp_path_factory.mktemp("methods")
    model = load_tiny(make_checkpoint(directory / "model", "llama", seed=2))

    def lowered(path: Path, name: str) -> Path:
        PLAIN[name][1](path, model.description, Sizes())
        return path

    adapters = [read_lowered(lowered(directory / name, name), model.description) for name in NAMES]
    return Served([adapter.deltas for adapter in adapters], model.architecture)


@pytest.mark.parametrize("group", ["qkv", "o", "gate_up", "down"])
def test_every_methods_linears_are_those_of_the_torch_backend(served: Served, group: str) -> None:
    place, step = served.layout.group(LAYER, group), served.step(ROW_SLOTS)
    num_rows = len(ROW_SLOTS)
    x, y = normal(1, num_rows, place.d_in).bfloat16(), normal(2, num_rows, sum(place.sizes))
    scaled, found = x.clone(), y.clone()
    deltas.scale_inputs(step, place, scaled)
    deltas.change_outputs(step, place, scaled, found, served.workspace(num_rows))
    right = outputs_of(served, LAYER, group, ROW_SLOTS, x, y)
    for slot, name in enumerate(["base", *NAMES]):
        names = served.layout.groups[group].names
        scales = [
            delta.scale
            for each in names
            for delta in served.torch.get(slot, NOTHING).at(Site(LAYER, each), InputScale)
        ]
        assert torch.equal(scaled[slot], (x[slot] * scales[0]).bfloat16() if scales else x[slot]), name
        if torch.equal(right[slot], y[slot].double()):
            assert torch.equal(found[slot], y[slot]), name
        else:
            assert off(found[slot] - y[slot], right[slot] - y[slot]) <= 3e-3, name


@pytest.mark.parametrize("sublayer", SUBLAYERS)
def test_every_methods_bottlenecks_are_those_of_the_torch_backend(served: Served, sublayer: str) -> None:
    site, num_rows = Site(LAYER, sublayer), len(ROW_SLOTS)
    hidden_size = served.architecture.hidden_size
    r, m = normal(3, num_rows, hidden_size), normal(4, num_rows, hidden_size)
    found = m.clone()
    bottlenecks.change_output(
        served.step(ROW_SLOTS), served.layout.place(site), r, found, served.workspace(num_rows)
    )
    right = sublayer_of(served, site, ROW_SLOTS, r, m)
    changed = [slot for slot in ROW_SLOTS if not torch.equal(right[slot], m[slot])]
    assert changed, "AdapterHub's configurations have some"
    for slot in ROW_SLOTS:
        if slot in changed:
            assert off(found[slot] - m[slot], right[slot] - m[slot]) <= 5e-3
        else:
            assert torch.equal(found[slot], m[slot])
