"""Vectors of a real encoder, against what its makers publish."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import numpy as np
import pytest
import torch

from manyhats.adapters.heads import Pooling
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.engine.request import EncodeRequest
from support.harnesses.engine import running_engine

TEXTS = (
    "That is a happy person",
    "That is a happy dog",
    "That is a very happy person",
    "Today is a sunny day",
)
SIMILARITIES = (0.6945775, 0.9429151, 0.2568761)
"""Of the first text with each other, in sentence-transformers with all-MiniLM-L6-v2 in float32."""


def load(quantization: Literal["auto", "nf4", "none"], dtype: torch.dtype) -> LoadedModel:
    return load_model("all-minilm-l6-v2", quantization=quantization, dtype=dtype)


def similarities(model: LoadedModel, dtype: Literal["float32", "bfloat16"]) -> list[float]:
    async def run() -> list[Any]:
        async with running_engine(model, dtype=dtype) as engine:
            ids = tuple(tuple(model.tokenizer.encode(text, add_special_tokens=True)) for text in TEXTS)
            outcome = await engine.encode(EncodeRequest(id="texts", inputs=ids))
            return [values[0] / np.linalg.norm(values[0]) for values in outcome.values]

    first, *others = asyncio.run(run())
    return [float(first @ other) for other in others]


def test_similarities_of_texts_are_those_that_are_published() -> None:
    model = load("auto", torch.float32)
    assert model.quantization == "none"  # it is small
    assert model.description.pooling is Pooling.MEAN
    assert model.architecture.max_context_length == 256
    assert similarities(model, "float32") == pytest.approx(SIMILARITIES, abs=1e-6)


@pytest.mark.parametrize(("quantization", "tolerance"), [("none", 0.005), ("nf4", 0.08)])
def test_similarities_in_fewer_bits_are_near_the_published(
    quantization: Literal["nf4", "none"], tolerance: float
) -> None:
    found = similarities(load(quantization, torch.bfloat16), "bfloat16")
    assert found == pytest.approx(SIMILARITIES, abs=tolerance)
