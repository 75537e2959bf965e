"""Adapters of every method on the trainer's decoder: the logits that they have where they are served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.composition import AdapterPart, compose
from manyhats.adapters.primitives import KVPrefix, LoweredAdapter
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.data.batch import collate
from manyhats.trainer.model.decoder import TrainingDecoder
from support.factories.every_method import PLAIN, Sizes
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import Prompt, Runner, load_tiny
from support.harnesses.training import make_batch, make_decoder, make_rows, row_ids
from support.oracles.peft import read_lowered
from support.oracles.primitives import logits_with
from support.oracles.transformers import load_transformers

TOLERANCE = 2e-4
VIRTUAL = ("adapterhub-prefix-flat", "union", "prefix", "prompt", "p-tuning", "multitask")
SERVED = {name: plain for name, plain in PLAIN.items() if name != "adapterhub-prefix"}
"""All but one that is a pickle."""


class Base:
    """A base, with a window shorter than some rows or without, and adapters of it."""

    def __init__(self, directory: Path, window: int | None) -> None:
        checkpoint = make_checkpoint(directory / "model", "mistral", seed=2, sliding_window=window)
        self.directory = directory
        self.model: LoadedModel = load_tiny(checkpoint)
        self.reference: Any = load_transformers(checkpoint)
        self.decoder: TrainingDecoder = make_decoder(self.model)

    def lowered(self, name: str) -> LoweredAdapter:
        directory = self.directory / name
        if not directory.exists():
            SERVED[name][1](directory, self.model.description, Sizes())
        return read_lowered(directory, self.model.description)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("methods"), 20)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Without a window, which AdapterHub's prefixes are not served with."""
    return Base(tmp_path_factory.mktemp("methods"), None)


@pytest.mark.parametrize("name", SERVED)
def test_a_method_gives_the_logits_of_the_oracle(base: Base, wide_base: Base, name: str) -> None:
    base = wide_base if name in ("adapterhub-prefix-flat", "union") else base
    lowered, batch = base.lowered(name), make_batch()
    logits = base.decoder.logits(batch, lowered).split(list(batch.segments))
    plain = base.decoder.logits(batch, None)
    assert (torch.cat(logits) - plain).abs().max() > 0.05
    for ids, own in zip(row_ids(batch), logits, strict=True):
        expected = logits_with(base.reference, lowered, ids)
        torch.testing.assert_close(own, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in SERVED if name not in VIRTUAL])
def test_a_method_gives_the_logits_of_the_engine_s_torch_backend(base: Base, name: str) -> None:
    lowered, batch = base.lowered(name), make_batch((23, 9))
    runner = Runner(base.model, TorchBackend(), adapters={1: lowered})
    prompts = [Prompt(ids, slot=1, new_tokens=0) for ids in row_ids(batch)]
    logits = base.decoder.logits(batch, lowered).split(list(batch.segments))
    for ran, own in zip(runner.run(prompts, all_logits=True), logits, strict=True):
        torch.testing.assert_close(own, ran.stacked, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_prefix_ahead_of_a_shared_beginning_is_seen_from_all_rows(wide_base: Base) -> None:
    """Also by way of an offset: AdapterHub's real tokens begin at position 0."""
    lowered = wide_base.lowered("adapterhub-prefix-flat")
    assert isinstance(lowered.prefix, KVPrefix)
    assert lowered.prefix.position_offset == -lowered.prefix.num_virtual_tokens
    rows = make_rows((30, 44), num_shared=26)
    shared, apart = (collate(rows, share_beginning=share) for share in (True, False))
    first, second = (wide_base.decoder.logits(batch, lowered) for batch in (shared, apart))
    torch.testing.assert_close(first[:30], second[:30], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first[30:], second[30 + 26 :], atol=1e-5, rtol=1e-5)


def test_deltas_add_up_where_several_act(base: Base) -> None:
    """Two LoRAs composed, at the same linears, and virtual tokens that run with them."""
    parts = [AdapterPart(name, base.lowered(name), 0.5) for name in ("lora", "rslora")]
    parts.append(AdapterPart("prompt", base.lowered("prompt"), 1.0))
    lowered = compose(parts, AdapterLimits())
    doubled = replace(lowered, deltas=(*lowered.deltas, *lowered.deltas))
    batch = make_batch()
    for adapter in (lowered, doubled):
        logits = base.decoder.logits(batch, adapter).split(list(batch.segments))
        for ids, own in zip(row_ids(batch), logits, strict=True):
            expected = logits_with(base.reference, adapter, ids)
            torch.testing.assert_close(own, expected, atol=TOLERANCE, rtol=TOLERANCE)
