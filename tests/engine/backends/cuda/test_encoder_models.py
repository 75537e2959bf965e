"""Whole encoders on the kernels: families and AdapterHub's methods, as the torch backend has them."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

import asyncio
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.heads import Pooling
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.cuda.backend import CudaBackend
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.request import EncodeRequest
from support.factories.adapterhub import ENCODER_PRESETS, make_adapterhub
from support.factories.adapters import make_lora
from support.factories.tiny_encoders import make_encoder
from support.factories.tiny_models import TINY_VOCAB_SIZE
from support.harnesses.engine import load_tiny, random_ids, running_engine

LIMITS = Limits(max_rows=64, max_sequences=32, adapter_bytes=8 << 20, memory_fraction=0.9)
TEXTS = tuple(tuple(random_ids(length, length, TINY_VOCAB_SIZE)) for length in (4, 2))
Found = dict[str, list[np.ndarray]]


async def read_all(
    model: LoadedModel, directory: Path, names: Collection[str], backend: Backend, dtype: str
) -> tuple[Found, Found]:
    """Values of every row by task, all tasks and the base in one batch; and those of each first text alone."""
    with closing(
        open_store(directory / f"store of {backend.name} {dtype}", model.description, [directory])
    ) as store:
        records: dict[str, AdapterRecord | None] = {"": None}
        for name in names:
            records[name] = store.register(Registration(name, Uri(str(directory / name)))).record
        async with running_engine(
            model, store.lower, backend=backend, dtype=dtype, max_num_batched_tokens=64
        ) as engine:

            async def read(name: str, texts: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
                asked = EncodeRequest(id="a", inputs=texts, pooling=Pooling.ALL, adapter=records[name])
                return list((await engine.encode(asked)).values)

            together = await asyncio.gather(*(read(name, TEXTS) for name in records))
            alone = {name: await read(name, TEXTS[:1]) for name in (*records,)[-1:]}
    return dict(zip(records, together, strict=True)), alone


def distance(found: list[np.ndarray], right: list[np.ndarray]) -> float:
    own, its = np.concatenate(found), np.concatenate(right)
    return float(np.linalg.norm(own - its) / np.linalg.norm(its))


def assert_as_good_as_torch(model: LoadedModel, directory: Path, names: Collection[str]) -> None:
    """No further from exact arithmetic than plain torch in bfloat16; a text alone has the same bits."""
    kernels, in_torch = CudaBackend(DEVICE, LIMITS), TorchBackend(DEVICE, "bfloat16", by_row=False)
    ours, alone = asyncio.run(read_all(model, directory, names, kernels, "bfloat16"))
    torchs, _ = asyncio.run(read_all(model, directory, names, in_torch, "bfloat16"))
    exact, _ = asyncio.run(read_all(model, directory, names, TorchBackend(), "float32"))
    for name, right in exact.items():
        assert distance(ours[name], right) <= 1.5 * distance(torchs[name], right) + 2e-3, name
        is_longer = len(right[0]) > len(TEXTS[0])  # by virtual tokens
        assert not name or is_longer or distance(right, exact[""]) > 0.02, f"{name} changes nothing"
    for name, values in alone.items():
        assert np.array_equal(values[0], ours[name][0]), name


def adapt(directory: Path, base: BaseDescription) -> list[str]:
    make_lora(directory / "lora", base, seed=1)
    return ["lora"]


@pytest.mark.parametrize("family", ["modernbert mean", "electra", "albert grouped"])
def test_encoders_are_as_exact_as_plain_torch(family: str, tmp_path: Path) -> None:
    model = load_tiny(make_encoder(tmp_path / "model", family, seed=4))
    assert_as_good_as_torch(model, tmp_path, adapt(tmp_path, model.description))


def test_every_method_of_encoders_in_one_batch_is_as_exact_as_plain_torch(tmp_path: Path) -> None:
    model = load_tiny(make_encoder(tmp_path / "model", seed=4))
    presets = (*ENCODER_PRESETS, "mam", "double_seq_bn")
    for seed, preset in enumerate(presets):
        make_adapterhub(tmp_path / preset, model.description, preset, seed=seed, scale=0.3)
    assert_as_good_as_torch(model, tmp_path, presets)
