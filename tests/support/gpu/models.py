"""Whole models on the kernels, and in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.cuda.backend import CudaBackend
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from support.gpu.interpreter import DEVICE
from support.harnesses.engine import Prompt, Ran, Runner

LIMITS = Limits(max_rows=64, max_sequences=32, adapter_bytes=8 << 20, memory_fraction=0.9)


def kernels(limits: Limits = LIMITS) -> Backend:
    return CudaBackend(DEVICE, limits)


def in_torch() -> Backend:
    """The same numbers, rounded in the same places, in plain torch."""
    return TorchBackend(DEVICE, "bfloat16", by_row=False)


def run(
    model: LoadedModel,
    backend: Backend,
    prompts: Sequence[Prompt],
    adapters: dict[int, LoweredAdapter],
    **options: Any,
) -> list[Ran]:
    runner = Runner(model, backend, adapters=adapters, cache_dtype="bfloat16", num_blocks=40)
    return runner.run(prompts, all_logits=True, **options)


def distance(ran: Ran, other: Ran, num_rows: int) -> float:
    """Of the logits of a prompt, relative."""
    own, its = ran.stacked[:num_rows], other.stacked[:num_rows]
    return float((own - its).norm() / its.norm())


def assert_as_good_as_torch(model: LoadedModel, prompts: Sequence[Prompt], **adapters: Any) -> None:
    """No further from exact arithmetic than plain torch in bfloat16; the same first tokens, but for near ties."""
    ours, torchs = (run(model, backend, prompts, **adapters) for backend in (kernels(), in_torch()))
    exact = run(model, TorchBackend(), prompts, **adapters)
    for prompt, our, its, right in zip(prompts, ours, torchs, exact, strict=True):
        count = len(prompt.token_ids)
        off = distance(our, right, count)
        assert off <= 1.5 * distance(its, right, count) + 1e-3
        last = right.logits[count - 1]
        assert last[our.token_ids[count]] >= last.max() - 2 * off * last.std()
