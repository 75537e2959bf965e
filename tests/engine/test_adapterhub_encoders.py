"""What AdapterHub has for encoders alone, against the library's steps in transformers' models."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manyhats.adapters.heads import Pooling
from support.factories.adapterhub import adapterhub_config, adapterhub_tensors, write_adapterhub
from support.factories.tiny_encoders import make_encoder
from support.harnesses.encoding import assert_close, hidden_values, read_all, transformers_model
from support.harnesses.engine import load_tiny

TOLERANCE = 1e-4
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
BACKENDS = ("cpu", "torch")


@contextmanager
def prompted(model: Any, prompt: Tensor, num_before: int) -> Iterator[None]:
    """The model with vectors among its normed embeddings, after so many rows."""

    def insert(module: Any, args: Any, embedded: Tensor) -> Tensor:
        parts = (embedded[:, :num_before], prompt[None], embedded[:, num_before:])
        return torch.cat(parts, dim=1)

    handle = model.embeddings.register_forward_hook(insert)
    yield
    handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_enter_behind_the_norm_of_the_embeddings(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=4)
    loaded, reference = load_tiny(checkpoint), transformers_model(checkpoint)
    expected, first = {"": hidden_values(reference)}, {}
    for seed, preset in enumerate(("prompt", "prompt_after_bos")):
        config = adapterhub_config(loaded.description, preset)
        tensors = adapterhub_tensors(loaded.description, config, seed=seed, scale=0.5)
        write_adapterhub(tmp_path / preset, config, tensors)
        (prompt,), num_before = tensors.values(), int(preset == "prompt_after_bos")
        with prompted(reference, prompt, num_before):
            rows = hidden_values(reference)
        first[preset] = [each[:1] for each in rows]
        own = [torch.arange(len(each)) for each in rows]
        kept = [(at < num_before) | (at >= num_before + len(prompt)) for at in own]
        expected[preset] = [each[which.numpy()] for each, which in zip(rows, kept, strict=True)]
    for backend in BACKENDS:
        found = asyncio.run(read_all(loaded, tmp_path, first, backend))
        for name, wanted in expected.items():
            assert_close(found[name], wanted, name, TOLERANCE)
        found = asyncio.run(read_all(loaded, tmp_path, first, backend, pooling=Pooling.FIRST))
        for name, wanted in first.items():
            assert_close(found[name], wanted, name, TOLERANCE)
    assert abs(first["prompt"][1] - expected["prompt"][1][0]).max() > 0.05
