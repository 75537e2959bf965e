"""``python -m benchmarks.encoding``: texts per second on an encoder, beside transformers and PEFT on the same machine.

32 texts of 64 random tokens at once: on the base, and four to each of eight LoRAs of rank 16 on all linears. PEFT runs
its adapters one after another. All systems by turns, on the same threads; medians and spread over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.engine.checkpoints.fetch import locate_model
from manyhats.engine.checkpoints.loader import load_model
from manyhats.engine.config import EngineConfig
from manyhats.engine.home import default_home
from manyhats.engine.opening import open_engine
from manyhats.engine.request import EncodeRequest

_NUM_TEXTS, _NUM_TOKENS, _NUM_TASKS = 32, 64, 8
_REPEATS = 5
_LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]

Figures = dict[str, list[float]]
Texts = tuple[tuple[int, ...], ...]


def make_texts(vocab_size: int) -> Texts:
    """Random tokens; which they are does not change the time."""
    rng = np.random.default_rng(0)
    return tuple(tuple(rng.integers(1000, vocab_size, _NUM_TOKENS).tolist()) for _ in range(_NUM_TEXTS))


def make_adapters(directory: Path, target: Path) -> Any:
    """PEFT's model with all adapters, which are saved below ``target`` by their names, from ``t0``."""
    transformers: Any = import_module("transformers")
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=16, target_modules=_LINEARS)
    model = get_peft_model(transformers.AutoModel.from_pretrained(directory), config, adapter_name="t0")
    for number in range(1, _NUM_TASKS):
        model.add_adapter(f"t{number}", config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.05)
    model.save_pretrained(str(target))
    return model.eval()


async def rate_of(run: Callable[[], Awaitable[object]]) -> float:
    """Texts per second of the median run, after one that does not count."""
    times = []
    for _ in range(_REPEATS + 1):
        begin_s = time.perf_counter()
        await run()
        times.append(time.perf_counter() - begin_s)
    return _NUM_TEXTS / statistics.median(times[1:])


async def measure_libraries(figures: Figures, directory: Path, peft: Any, texts: Texts) -> None:
    """Transformers' model in two dtypes, and PEFT's."""
    transformers: Any = import_module("transformers")
    ids = torch.tensor(texts)
    share = _NUM_TEXTS // _NUM_TASKS

    async def base(model: Any) -> None:
        model(input_ids=ids).last_hidden_state.mean(1)

    async def all_tasks() -> None:
        for number in range(_NUM_TASKS):
            peft.set_adapter(f"t{number}")
            peft(input_ids=ids[share * number : share * (number + 1)]).last_hidden_state.mean(1)

    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            model = transformers.AutoModel.from_pretrained(directory, dtype=dtype).eval()
            name = f"transformers, {str(dtype).removeprefix('torch.')}: base"
            figures[name].append(await rate_of(partial(base, model)))
        figures["PEFT, float32: 8 tasks"].append(await rate_of(all_tasks))


async def measure_engine(
    figures: Figures,
    model_name: str,
    texts: Texts,
    adapters: Path,
    quantization: Literal["nf4", "none"],
    dtype: Literal["bfloat16", "float32"],
) -> None:
    """The engine as it is served, in one form of the base."""
    model = load_model(model_name, quantization=quantization, dtype=getattr(torch, dtype))
    share = _NUM_TEXTS // _NUM_TASKS
    with (
        tempfile.TemporaryDirectory() as store_directory,
        closing(open_store(Path(store_directory), model.description, [adapters])) as store,
    ):
        engine = open_engine(model, EngineConfig(dtype=dtype), store.lower)
        await engine.start()
        records = [
            (await asyncio.to_thread(store.register, Registration(name, Uri(str(adapters / name))))).record
            for name in (f"t{number}" for number in range(_NUM_TASKS))
        ]
        by_task = [
            EncodeRequest(
                id=record.task_id, inputs=texts[share * number : share * (number + 1)], adapter=record
            )
            for number, record in enumerate(records)
        ]
        name = f"manyhats, {'NF4, ' if quantization == 'nf4' else ''}{dtype}"
        figures[f"{name}: base"].append(
            await rate_of(lambda: engine.encode(EncodeRequest(id="base", inputs=texts)))
        )
        figures[f"{name}: 8 tasks"].append(
            await rate_of(lambda: asyncio.gather(*map(engine.encode, by_task)))
        )
        await engine.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoding", description=__doc__)
    parser.add_argument(
        "--model", default="all-minilm-l6-v2", help="alias, directory or hub id (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    options = parser.parse_args(arguments)
    directory = locate_model(options.model, default_home()).directory
    texts = make_texts(30_000)
    figures: Figures = defaultdict(list)
    forms: tuple[tuple[Literal["nf4", "none"], Literal["bfloat16", "float32"]], ...]
    forms = (("none", "float32"), ("none", "bfloat16"), ("nf4", "bfloat16"))
    with tempfile.TemporaryDirectory() as adapters:
        peft = make_adapters(directory, Path(adapters))
        for _ in range(options.rounds):
            asyncio.run(measure_libraries(figures, directory, peft, texts))
            for form in forms:
                asyncio.run(measure_engine(figures, options.model, texts, Path(adapters), *form))
    for name, found in figures.items():
        print(f"{name:36s} {statistics.median(found):6.0f} ({min(found):.0f} to {max(found):.0f}) texts/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
