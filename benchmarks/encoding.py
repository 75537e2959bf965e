"""Texts per second on an encoder, beside transformers and PEFT: 32 texts of 64 tokens at once.

On the base, and four to each of eight LoRAs of rank 16 on all linears, which PEFT runs one after another.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.measure import Measurement

_NUM_TEXTS, _NUM_TOKENS, _NUM_TASKS = 32, 64, 8
_SHARE = _NUM_TEXTS // _NUM_TASKS
_REPEATS = 5
_LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]

Form = Literal["float32", "bfloat16", "nf4"]
FORMS: tuple[Form, ...] = ("float32", "bfloat16", "nf4")
"""Of manyhats; the libraries run in the first two."""
BASE, TASKS = "base_texts_per_s", "tasks_texts_per_s"
Texts = tuple[tuple[int, ...], ...]


def make_texts(vocab_size: int) -> Texts:
    """Random tokens; which they are does not change the time."""
    random = np.random.default_rng(0)
    return tuple(
        tuple(random.integers(vocab_size // 8, vocab_size, _NUM_TOKENS).tolist()) for _ in range(_NUM_TEXTS)
    )


async def rate_of(run: Callable[[], Awaitable[object]]) -> float:
    """Texts per second of the median run, after one that does not count."""
    times = []
    for _ in range(_REPEATS + 1):
        begin_s = time.perf_counter()
        await run()
        times.append(time.perf_counter() - begin_s)
    return _NUM_TEXTS / median(times[1:])


class LibrariesSession:
    """Transformers' model, and PEFT's with all adapters; lives in a worker process.

    Args:
        directory: of the model.
        adapters: where PEFT's adapters are saved by their names, from ``t0``.
    """

    def __init__(self, directory: Path, adapters: Path) -> None:
        transformers: Any = import_module("transformers")
        peft: Any = import_module("peft")
        config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=16, target_modules=_LINEARS)
        model = peft.get_peft_model(
            transformers.AutoModel.from_pretrained(directory), config, adapter_name="t0"
        )
        for number in range(1, _NUM_TASKS):
            model.add_adapter(f"t{number}", config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, 0, 0.05)
        model.save_pretrained(str(adapters))
        self._peft = model.eval()
        self._make = partial(transformers.AutoModel.from_pretrained, directory)
        self._ids = torch.tensor(make_texts(model.config.vocab_size))

    def base(self, dtype: str) -> Measurement:
        """The base in a dtype."""
        model = self._make(dtype=getattr(torch, dtype)).eval()

        async def run() -> None:
            model(input_ids=self._ids).last_hidden_state.mean(1)

        with torch.inference_mode():
            return Measurement({BASE: asyncio.run(rate_of(run))})

    def tasks(self, dtype: str) -> Measurement:
        """All tasks in a dtype, one after another."""
        self._peft.to(getattr(torch, dtype))

        async def run() -> None:
            for number in range(_NUM_TASKS):
                self._peft.set_adapter(f"t{number}")
                own = self._ids[_SHARE * number : _SHARE * (number + 1)]
                self._peft(input_ids=own).last_hidden_state.mean(1)

        with torch.inference_mode():
            return Measurement({TASKS: asyncio.run(rate_of(run))})


class EncoderSession:
    """The engine as it is served; lives in a worker process.

    Args:
        model: as given to ``manyhats serve --model``.
        adapters: see ``LibrariesSession``.
    """

    def __init__(self, model: str, adapters: Path) -> None:
        self._model = model
        self._adapters = adapters

    def measure(self, form: Form) -> Measurement:
        """The base in a form, and all tasks on it."""
        return asyncio.run(self._measure(form))

    async def _measure(self, form: Form) -> Measurement:
        from manyhats.adapters.registration import Registration, Uri
        from manyhats.adapters.store.opening import open_store
        from manyhats.engine.checkpoints.loader import load_model
        from manyhats.engine.config import EngineConfig
        from manyhats.engine.opening import open_engine
        from manyhats.engine.request import EncodeRequest

        dtype: Literal["float32", "bfloat16"] = "float32" if form == "float32" else "bfloat16"
        model = load_model(
            self._model, quantization="nf4" if form == "nf4" else "none", dtype=getattr(torch, dtype)
        )
        texts = make_texts(model.architecture.vocab_size)
        with (
            tempfile.TemporaryDirectory() as directory,
            closing(open_store(Path(directory), model.description, [self._adapters])) as store,
        ):
            engine = open_engine(model, EngineConfig(dtype=dtype), store.lower)
            await engine.start()
            requests = []
            for number in range(_NUM_TASKS):
                uri = Uri(str(self._adapters / f"t{number}"))
                record = (await asyncio.to_thread(store.register, Registration(f"t{number}", uri))).record
                own = texts[_SHARE * number : _SHARE * (number + 1)]
                requests.append(EncodeRequest(id=record.task_id, inputs=own, adapter=record))
            base = await rate_of(lambda: engine.encode(EncodeRequest(id="base", inputs=texts)))
            tasks = await rate_of(lambda: asyncio.gather(*map(engine.encode, requests)))
            await engine.stop()
        return Measurement({BASE: base, TASKS: tasks})
