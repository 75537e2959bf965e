"""A forward is one program: whole or cut anywhere, on any number of threads, it leaves the same bits."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manyhats.adapters.primitives import Bottleneck, BottleneckInput, Delta, InputScale, LoweredAdapter
from manyhats.adapters.sites import BaseDescription, Site
from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.cpu.compile import counted_compilation
from manyhats.engine.backends.cpu.dense import instructions as dense
from manyhats.engine.backends.cpu.int16 import instructions
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.program import Instructions
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import Prompt, Runner, digest_of, load_tiny, random_ids, random_lora

FAMILIES = {
    "llama": {},
    "qwen3: norms of queries and keys": {"family": "qwen3"},
    "gemma2: norms of outputs, caps, GELU": {"family": "gemma2", "sliding_window": 20},
    "olmo2: no norm ahead": {"family": "olmo2"},
    "granite: scaled outputs": {"family": "granite"},
    "gpt2: learned positions, no gate": {"family": "gpt2", "kv_heads": 4},
    "gpt_neox: two norms ahead, side by side": {"family": "gpt_neox", "kv_heads": 4},
    "opt: norms of the stream, projections": {
        "family": "opt",
        "kv_heads": 4,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 32,
    },
    "cohere: one norm ahead, norms of each head": {"family": "cohere", "use_qk_norm": True},
    "qwen3_moe: experts, and one layer without": {
        "family": "qwen3_moe",
        "num_layers": 3,
        "mlp_only_layers": [1],
        "num_experts": 9,
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    settings: dict[str, Any] = FAMILIES[request.param]
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("program") / "model", seed=5, **settings)
    return load_tiny(checkpoint, "nf4")


@pytest.fixture(params=[True, False], ids=["exact", "integers"])
def is_exact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the NF4 linears take float32, or integers, on any processor."""
    monkeypatch.setattr(instructions, "has_instructions", lambda: True)
    return bool(request.param)


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


def one_by_one(run: Any) -> Any:
    """Each instruction as a call of its own."""

    def run_cut(self: CpuKernels, instructions: Instructions, *others: Any) -> None:
        rows, numbers = instructions
        for i in range(len(rows)):
            run(self, (rows[i : i + 1], numbers[i : i + 1]), *others)

    return run_cut


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_the_whole_leaves_the_bits_that_its_operations_leave_one_by_one(
    model: LoadedModel, num_threads: int, is_exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = logits(Runner(model, CpuBackend(num_threads, is_exact=is_exact), adapters=adapters(model)))
    monkeypatch.setattr(CpuKernels, "run", one_by_one(CpuKernels.run))
    assert torch.equal(
        whole, logits(Runner(model, CpuBackend(1, is_exact=is_exact), adapters=adapters(model)))
    )


def test_a_row_is_the_same_bits_alone_and_in_any_batch(model: LoadedModel, is_exact: bool) -> None:
    runner = Runner(model, CpuBackend(2, is_exact=is_exact), adapters=adapters(model))
    together = [each.stacked for each in runner.run(PROMPTS, max_tokens=64, all_logits=True)]
    for prompt, expected in zip(PROMPTS, together, strict=True):
        (alone,) = runner.run([prompt], max_tokens=5, all_logits=True)
        assert torch.equal(alone.stacked, expected)


def test_integers_are_near_the_exact_product(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = logits(Runner(model, CpuBackend(2), adapters=adapters(model)))
    monkeypatch.setattr(instructions, "has_instructions", lambda: True)
    backend = CpuBackend(2, is_exact=False)
    assert backend.name == "cpu-int16"
    near = logits(Runner(model, backend, adapters=adapters(model)))
    assert not torch.equal(near, exact)
    assert float((near - exact).abs().median() / exact.abs().mean()) < 0.002


@pytest.mark.parametrize("are_pairs", [True, False], ids=["pairs", "widened"])
def test_dense_bfloat16_is_near_float32_and_a_row_the_same_bits_in_any_batch(
    are_pairs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "has_pairs", lambda: are_pairs)
    dense_model = load_tiny(make_checkpoint(tmp_path / "model", seed=5), "none", torch.bfloat16)
    exact = logits(Runner(dense_model, CpuBackend(2), adapters=adapters(dense_model)))
    runner = Runner(dense_model, CpuBackend(2, is_exact=False), adapters=adapters(dense_model))
    kinds = runner.model.instructions[0]
    kinds = kinds[kinds[:, col.INSTRUCTION] == col.LINEAR][:, col.KIND].tolist()
    assert (col.BFLOAT16_PAIRS if are_pairs else col.BFLOAT16_GROUPS) in kinds
    together = [each.stacked for each in runner.run(PROMPTS, max_tokens=64, all_logits=True)]
    assert float((torch.cat(together) - exact).abs().median() / exact.abs().mean()) < 0.01
    for prompt, expected in zip(PROMPTS, together, strict=True):
        (alone,) = runner.run([prompt], max_tokens=5, all_logits=True)
        assert torch.equal(alone.stacked, expected)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_timed_forward_has_the_clock_after_each_instruction_and_the_same_bits(
    model: LoadedModel, num_threads: int
) -> None:
    runner = Runner(model, CpuBackend(num_threads), adapters=adapters(model))
    expected = logits(runner)
    kernels = runner.model._kernels
    kernels.timed = []
    began_ns = time.monotonic_ns()
    assert torch.equal(logits(runner), expected)
    took_ns = time.monotonic_ns() - began_ns
    whole, _ = runner.model.instructions
    assert any(rows is whole for rows, _ in kernels.timed)
    for rows, times in kernels.timed:
        assert times.shape == (len(rows) + 1,)
        assert times[0] >= began_ns
        assert (np.diff(times) >= 0).all()
    assert 0 < sum(int(times[-1] - times[0]) for _, times in kernels.timed) <= took_ns


def test_threads_that_stay_away_are_not_waited_for(model: LoadedModel) -> None:
    backend = CpuBackend(2)
    expected = logits(Runner(model, CpuBackend(1), adapters=adapters(model)))
    runner = Runner(model, backend, adapters=adapters(model))
    backend.leave_processors(1000)
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
        for layer, name in ((0, "q_proj"), (0, "up_proj"), (0, "o_proj"), (1, "k_proj"), (1, "down_proj"))
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
    begun: list[str] = []
    with counted_compilation(lambda stage, done, total: begun.append(stage)):
        backend._kernels.softcap(torch.ones(1, 16), 2.0)
    assert not begun


def test_cache_and_adapters_may_be_of_different_dtypes(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=5), "nf4")
    found = [
        logits(
            Runner(model, backend, adapters=adapters(model), cache_dtype="bfloat16", adapter_dtype="float32")
        )
        for backend in (CpuBackend(2), TorchBackend())
    ]
    torch.testing.assert_close(*found, atol=2e-2, rtol=1e-3)
