"""Steps of the kernels, launched and replayed, wait for the device in ``Pending.result`` alone."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

import asyncio
from pathlib import Path
from typing import Any

import pytest
from triton.runtime.interpreter import GridExecutor

from manyhats.engine.backends.cuda.backend import CudaBackend
from manyhats.engine.backends.cuda.model import CudaLogits, CudaModel
from manyhats.engine.backends.limits import Limits
from manyhats.engine.request import ResponseOptions, SamplingParams
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.gpu.no_sync import guard, may_sync
from support.gpu.recording import Recorder
from support.harnesses.engine import (
    collect,
    load_tiny,
    make_record,
    make_request,
    random_ids,
    random_lora,
    running_engine,
)

LIMITS = Limits(max_rows=16, max_sequences=2, adapter_bytes=4 << 20, memory_fraction=0.9)
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=1, repetition_penalty=1.2),
)


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches under the guard, which the interpreter of kernels is free of; what was launched."""
    interpret = GridExecutor.__call__

    def freely(self: Any, *args: Any, **options: Any) -> Any:
        with may_sync():
            return interpret(self, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", freely)
    return guard(monkeypatch, CudaModel, CudaLogits)


def test_the_loop_runs_ahead_of_steps_and_waits_for_none(tmp_path: Path, guarded: list[str]) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "tiny", seed=5), "nf4")
    recorder = Recorder()
    backend = CudaBackend(DEVICE, LIMITS, recorder)
    adapter = make_record("lora")

    async def run() -> None:
        async with running_engine(
            model,
            {"lora": random_lora(model.description, 1)},
            backend=backend,
            dtype="bfloat16",
            max_num_sequences=2,
            max_num_batched_tokens=16,
        ) as engine:
            requests = [
                make_request(
                    random_ids(index, 3 + index, TINY_VOCAB_SIZE),
                    adapter if index else None,
                    new_tokens=5,
                    sampling=SAMPLINGS[index],
                    response=ResponseOptions(logprobs=True, top_logprobs=2),
                )
                for index in range(2)
            ]
            answers = await asyncio.gather(*(collect(engine, request) for request in requests))
            assert all(len(answer.token_ids) == 5 for answer in answers)

    asyncio.run(run())
    assert guarded.count("forward") >= guarded.count("finish") > 5
    assert recorder.num_replays
