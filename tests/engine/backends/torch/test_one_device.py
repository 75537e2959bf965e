"""A step mixes no tensors of host and device: it runs on ``meta`` tensors, which refuse those of the host."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from manyhats.adapters.primitives import HeadRows, HeadWeight, LoweredAdapter
from manyhats.adapters.store.opening import open_store
from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.backends.torch.batched import logits as batched_logits
from manyhats.engine.backends.wants import Targets, Wants
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.penalties import LogitChanges
from manyhats.engine.sampling.sampler import SamplingRow, choices_of
from support.factories.adapterhub import make_adapterhub
from support.factories.every_method import COMPOSED, PLAIN, Sizes, register_every_method
from support.factories.tiny_encoders import make_encoder
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import digest_of, load_tiny, read_lora
from support.harnesses.sampling import mask_of

LENGTHS = (1, 9, 40)


@pytest.fixture(autouse=True)
def nothing_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no values cannot be fetched."""
    monkeypatch.setattr(batched_logits, "_fetched", lambda values: values)


def plan_of(slots: tuple[int, int, int], is_encoder: bool) -> StepPlan:
    """Three texts from their beginning, in blocks of 16."""
    starts = np.cumsum([0, *LENGTHS])
    num_rows = int(starts[-1])
    own = np.concatenate([np.arange(length) for length in LENGTHS])
    rows = int32(range(num_rows))
    return StepPlan(
        token_ids=own.astype(np.int32),
        positions=own.astype(np.int32),
        cells=np.concatenate([64 * i + np.arange(length) for i, length in enumerate(LENGTHS)]),
        query_start=int32(starts),
        context_len=int32(LENGTHS),
        block_tables=int32([[4 * i, 4 * i + 1, 4 * i + 2] for i in range(3)]),
        row_slots=np.repeat(int32(slots), LENGTHS),
        logit_rows=rows[:0] if is_encoder else rows,
        hidden_rows=rows if is_encoder else rows[:0],
        block_copies=((0, 12),),
    )


def wants_of(num_rows: int, vocab_size: int) -> Wants:
    params = SamplingParams(
        temperature=0.9, top_k=9, top_p=0.9, min_p=0.01, typical_p=0.9, repetition_penalty=1.2
    )
    edits = LogitChanges(params, [1, 2], [3]).edits
    row = SamplingRow(params=params, edits=edits, allowed=mask_of([True] * vocab_size), num_logprobs=2)
    targets = Targets(np.arange(num_rows), np.zeros(num_rows, np.int64), np.ones(num_rows, np.int64))
    return Wants(choices_of([row, row], [0, 9], vocab_size), targets, int32([1]))


def launch(model: LoadedModel, adapters: list[LoweredAdapter], dtype: str) -> None:
    """A step for each adapter beside the base; whatever is wanted of it is launched, and nothing collected."""
    backend = TorchBackend("meta", dtype)
    prepared = backend.prepare(model.architecture, model.weights)
    cache = backend.new_cache(model.architecture, 16, "bfloat16", 1 << 22)
    slots = backend.new_adapters(model.architecture, 3, "bfloat16")
    is_encoder = model.architecture.head is None
    for adapter in adapters:
        slots.place(1, slots.pack(adapter))
        for order in ((1, 1, 0), (1, 0, 1)):
            plan = plan_of(order, is_encoder)
            logits = prepared.forward(plan, cache, slots)
            if not is_encoder:
                size = adapter.vocab_size or TINY_VOCAB_SIZE
                logits.finish(wants_of(plan.logit_rows.size, size))
        slots.clear(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_method_and_head(tmp_path: Path, dtype: str) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=3), "nf4")
    with closing(open_store(tmp_path / "store", model.description, [tmp_path])) as store:
        register_every_method(store, tmp_path / "sources", model.description, Sizes())
        adapters = [store.lower(store.resolve(task)) for task in (*PLAIN, *COMPOSED)]
    width = model.architecture.read_size
    added = HeadRows(torch.tensor([TINY_VOCAB_SIZE, 3]), torch.ones(2, width), torch.ones(2))
    adapters.append(LoweredAdapter(digest_of("a"), (added,), vocab_size=TINY_VOCAB_SIZE + 1))
    adapters.append(LoweredAdapter(digest_of("b"), (HeadWeight(torch.ones(TINY_VOCAB_SIZE, width)),)))
    launch(model, adapters, dtype)


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "opt"])
def test_families(tmp_path: Path, family: str) -> None:
    options = (
        {"kv_heads": 4, "do_layer_norm_before": False, "word_embed_proj_dim": 64} if family == "opt" else {}
    )
    model = load_tiny(make_checkpoint(tmp_path / "model", family, seed=3, **options), "nf4")
    launch(model, [LoweredAdapter(digest_of("none"), ())], "bfloat16")


@pytest.mark.parametrize("family", ["bert", "modernbert", "albert"])
def test_encoders(tmp_path: Path, family: str) -> None:
    model = load_tiny(make_encoder(tmp_path / "model", family, seed=3))
    adapters = [LoweredAdapter(digest_of("none"), ())]
    if family == "bert":
        names = ("noreft", "gated_seq_bn", "gated_lora", "gated_ia3", "seq_bn_inv")
        for name in names:
            make_adapterhub(tmp_path / name, model.description, name, scale=0.3)
        adapters += [read_lora(tmp_path / name, model.description) for name in names]
    launch(model, adapters, "bfloat16")
