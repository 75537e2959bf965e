"""A forward is one program: whole or cut anywhere, on any number of threads, it leaves the same bits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manyhats.adapters.primitives import Bottleneck, BottleneckInput, Delta, InputScale, LoweredAdapter
from manyhats.adapters.sites import BaseDescription, Site
from manyhats.engine.backends.cpu import step
from manyhats.engine.backends.cpu.avx512_bf16 import Avx512Bf16Linear
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.cpu.forward import HostLinear
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import CpuLinear, pack_linear
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.model.weights import Linear
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import Prompt, Runner, digest_of, load_tiny, random_ids, random_lora

FAMILIES = {
    "llama": {},
    "qwen3: norms of queries and keys": {"family": "qwen3"},
    "gemma2: norms of outputs, caps, GELU": {"family": "gemma2", "sliding_window": 20},
    "olmo2: no norm ahead": {"family": "olmo2"},
    "granite: scaled outputs": {"family": "granite"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    settings: dict[str, Any] = FAMILIES[request.param]
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("program") / "model", seed=5, **settings)
    return load_tiny(checkpoint, "nf4")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def rescaling(base: BaseDescription) -> LoweredAdapter:
    """Inputs of a group of one, and of some members of groups of several."""
    deltas: list[Delta] = [
        InputScale(Site(layer, name), 1 + normal(layer, base.linears[name][0]))
        for layer, name in ((0, "down_proj"), (0, "v_proj"), (1, "up_proj"), (1, "q_proj"), (1, "o_proj"))
    ]
    return LoweredAdapter(digest_of("rescaling"), tuple(deltas))


def bottlenecks(base: BaseDescription) -> LoweredAdapter:
    size = base.linears["q_proj"][0]
    deltas = [
        Bottleneck(
            site=Site(layer, sublayer),
            input=BottleneckInput.OUTPUT,
            down=normal(layer, 6, size),
            down_bias=normal(7, 6),
            up=normal(8, size, 6),
            up_bias=normal(9, size),
            activation="relu",
            scale=torch.ones(1),
        )
        for layer, sublayer in ((0, "feed_forward"), (1, "attention"))
    ]
    return LoweredAdapter(digest_of("bottlenecks"), tuple(deltas))


def adapters(model: LoadedModel) -> dict[int, LoweredAdapter]:
    base = model.description
    return {
        1: random_lora(base, 1, rank=9),
        2: rescaling(base),
        3: bottlenecks(base),
        4: random_lora(base, 4),
    }


PROMPTS = [Prompt(random_ids(i, 3 + 11 * i, TINY_VOCAB_SIZE), slot=i % 5, new_tokens=3) for i in range(7)]


def logits(runner: Runner) -> Tensor:
    ran = runner.run(PROMPTS, max_tokens=64, all_logits=True)
    return torch.cat([each.stacked for each in ran])


def one_by_one(parts: Sequence[Any]) -> list[Any]:
    """Each instruction as a call of its own."""
    cut: list[Any] = []
    for part in parts:
        if isinstance(part, HostLinear):
            cut.append(part)
        else:
            instructions, numbers = part
            cut += [(instructions[i : i + 1], numbers[i : i + 1]) for i in range(len(instructions))]
    return cut


def test_a_forward_is_one_call(model: LoadedModel) -> None:
    assert len(Runner(model, CpuBackend(1)).model.parts) == 1


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_the_whole_leaves_the_bits_that_its_operations_leave_one_by_one(
    model: LoadedModel, num_threads: int
) -> None:
    whole = Runner(model, CpuBackend(num_threads), adapters=adapters(model))
    cut = Runner(model, CpuBackend(1), adapters=adapters(model))
    cut.model.parts = one_by_one(cut.model.parts)
    assert torch.equal(logits(whole), logits(cut))


def test_threads_that_stay_away_are_not_waited_for(model: LoadedModel) -> None:
    backend = CpuBackend(2)
    expected = logits(Runner(model, CpuBackend(1), adapters=adapters(model)))
    runner = Runner(model, backend, adapters=adapters(model))
    backend.leave_processors(1000)
    assert torch.equal(logits(runner), expected)


@dataclass(frozen=True, slots=True, eq=False)
class LibraryLinear(Avx512Bf16Linear):
    """A linear that the program has to stop for, with exact numbers."""

    exact: CpuLinear

    def __call__(self, x: Tensor) -> Tensor:
        return CpuKernels(1).linear(x, self.exact)


GROUPS = ("qkv", "o", "gate_up", "down", "head")


@pytest.mark.parametrize("which", [GROUPS, ("qkv",), ("gate_up", "head"), ("o", "down")], ids=", ".join)
def test_linears_that_a_library_runs_come_between_its_parts(
    model: LoadedModel, which: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(Runner(model, CpuBackend(1), adapters=adapters(model)))
    order = [*GROUPS[:4] * model.architecture.num_layers, "head"]

    def pack(self: CpuKernels, parts: Sequence[Linear]) -> CpuLinear | LibraryLinear:
        exact, empty = pack_linear(parts), torch.empty(0)
        if order.pop(0) not in which:
            return exact
        return LibraryLinear(exact.in_features, exact.out_features, empty, empty, empty, None, exact)

    monkeypatch.setattr(CpuKernels, "pack", pack)
    runner = Runner(model, CpuBackend(1), adapters=adapters(model))
    num_linears = sum(model.architecture.num_layers if name != "head" else 1 for name in which)
    assert sum(isinstance(part, HostLinear) for part in runner.model.parts) == num_linears
    assert torch.equal(logits(runner), expected)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_adapters_that_come_and_go_beside_a_step_do_not_disturb_it(
    model: LoadedModel, num_threads: int
) -> None:
    base = model.description
    runner = Runner(model, CpuBackend(num_threads), adapters={2: rescaling(base), 3: bottlenecks(base)})
    prompts = [Prompt(random_ids(i, 30, TINY_VOCAB_SIZE), slot=2 + i % 2, new_tokens=2) for i in range(4)]
    expected = [each.stacked for each in runner.run(prompts, all_logits=True)]
    scales: list[Delta] = [
        InputScale(Site(layer, name), torch.full((base.linears[name][0],), 2.0))
        for layer, name in ((0, "q_proj"), (0, "gate_proj"), (0, "o_proj"), (1, "k_proj"), (1, "down_proj"))
    ]
    others = [LoweredAdapter(digest_of("elsewhere"), tuple(scales)), random_lora(base, 9, rank=200)]
    packed = [runner.slots.pack(each) for each in others]
    is_over = threading.Event()

    def come_and_go() -> None:
        while not is_over.is_set():
            for each in packed:
                runner.slots.place(5, each)
                runner.slots.clear(5)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(10):
            found = runner.run(prompts, all_logits=True)
            assert all(torch.equal(one.stacked, other) for one, other in zip(found, expected, strict=True))
    finally:
        is_over.set()
        thread.join()


def test_what_runs_between_steps_needs_no_kernel_of_its_own(tmp_path: Path) -> None:
    backend = CpuBackend(1)
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=5), "nf4")
    runner = Runner(model, backend, cache_dtype="bfloat16", adapter_dtype="float32")
    runner.run(PROMPTS[:1])
    step.part_for.cache_clear()
    backend._kernels.softcap(torch.ones(1, 16), 2.0)
    step.part_for(True, False)
    assert step.part_for.cache_info().hits == 1


def test_cache_and_adapters_may_be_of_different_dtypes(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=5), "nf4")
    found = [
        logits(
            Runner(model, backend, adapters=adapters(model), cache_dtype="bfloat16", adapter_dtype="float32")
        )
        for backend in (CpuBackend(2), TorchBackend())
    ]
    torch.testing.assert_close(*found, atol=2e-2, rtol=1e-3)
