"""Texts read on an encoder under several tasks, from their files on."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.heads import Pooling
from manyhats.adapters.lowering.inspect import inspect
from manyhats.adapters.registration import Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.request import EncodeRequest
from support.factories.tiny_models import TINY_VOCAB_SIZE
from support.harnesses.backends import assert_alike, named_backend
from support.harnesses.engine import random_ids, running_engine

TEXTS = tuple(tuple(random_ids(length, length, TINY_VOCAB_SIZE)) for length in (1, 9, 40, 70))


def transformers_model(checkpoint: Path) -> Any:
    """What transformers makes of a checkpoint, without a head."""
    transformers: Any = import_module("transformers")
    model = transformers.AutoModel.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    model.train(False)
    return model


@torch.no_grad()
def hidden_values(model: Any, **options: Any) -> list[np.ndarray]:
    """What it gives for every text, [T, D]."""
    return [model(input_ids=torch.tensor([ids]), **options).last_hidden_state[0].numpy() for ids in TEXTS]


async def read_all(
    model: LoadedModel,
    directory: Path,
    sources: Mapping[str, Any] | Collection[str],
    backend: str,
    *,
    pooling: Pooling = Pooling.ALL,
    texts: tuple[tuple[int, ...], ...] = TEXTS,
    **engine: Any,
) -> dict[str, list[np.ndarray]]:
    """Values of every text by task, all tasks and the base in one batch; each text alone has the same bits.

    Tasks without a source of their own are directories of their names.
    """
    with closing(open_store(directory / backend, model.description, [directory])) as store:
        opened = named_backend(backend)
        options = {"max_num_batched_tokens": 128, **engine}
        async with running_engine(model, store.lower, backend=opened, **options) as running:
            records: dict[str, AdapterRecord | None] = {"": None}
            for name in sources:
                own = sources[name] if isinstance(sources, Mapping) else None
                source = own if isinstance(own, Uri | Parts) else Uri(str(directory / name))
                for base in (None, model.description) if isinstance(source, Uri) else ():
                    assert inspect(Path(source.uri), base).refusals == ()
                registration = Registration(name, source)
                registered = await asyncio.to_thread(store.register, registration, probe=running.probe)
                records[name] = registered.record

            def asked(name: str, inputs: tuple[tuple[int, ...], ...]) -> EncodeRequest:
                return EncodeRequest(id="a", inputs=inputs, pooling=pooling, adapter=records[name])

            outputs = await asyncio.gather(*(running.encode(asked(name, texts)) for name in records))
            found = {name: list(output.values) for name, output in zip(records, outputs, strict=True)}
            for name, values in found.items():
                for text, together in zip(texts, values, strict=True):
                    alone = await running.encode(asked(name, (text,)))
                    assert_alike(alone.values[0], together, backend)
    return found


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], name: str, tolerance: float) -> None:
    """Compare values text by text."""
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance, err_msg=name)
