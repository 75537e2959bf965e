"""One small batch before the first request: kernels are compiled or loaded, and the model proves that it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.primitives import Affine, Bottleneck, BottleneckInput, LoweredAdapter, LowRank
from manyhats.adapters.sites import Site
from manyhats.engine.backends.backend import AdapterSlots, Kernels, KVCache
from manyhats.engine.backends.batch import AdapterRows, Batch
from manyhats.engine.backends.decoder import Decoder
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.sampler import SamplingRow, sample


def warm_up(
    decoder: Decoder,
    cache: KVCache,
    slots: AdapterSlots,
    slot: int,
    kernels: Kernels[Any, Any],
    before_choosing: Callable[[], None] = lambda: None,
) -> None:
    """Runs one token through the decoder and samples the next, with an adapter in an empty slot that takes all kernels.

    Call it before the cache holds anything: it writes to block 0. ``before_choosing`` is called between the two.

    Raises:
        ModelError: the logits are not finite.
    """
    kernels.start_thread()
    slots.write(slot, _every_kernel(decoder.architecture))
    try:
        with torch.inference_mode():
            logits = decoder.forward(_one_token(slot), cache, slots)
    finally:
        slots.clear(slot)
    if not torch.isfinite(logits).all():
        raise ModelError("the model's logits are not finite: are its weights whole?")
    before_choosing()
    choose_once(logits, kernels)


def choose_once(logits: Tensor, kernels: Kernels[Any, Any]) -> None:
    """Chooses a token of one row's logits [1, V] in the way that takes all of the kernel."""
    params = SamplingParams(temperature=1.0, top_p=0.5)
    sample(logits, [SamplingRow(params=params, num_logprobs=1)], kernels)


def _every_kernel(architecture: Architecture) -> LoweredAdapter:
    """An adapter that changes nothing, at the sites of one layer."""
    first = architecture.blocks[0].linears()[0]
    d_in, d_out = first.d_in, first.d_out
    bottleneck = Bottleneck(
        site=Site(0, "attention"),
        input=BottleneckInput.OUTPUT,
        down=torch.zeros(1, d_in),
        down_bias=torch.zeros(1),
        up=torch.zeros(d_in, 1),
        up_bias=torch.zeros(d_in),
        activation="relu",
        scale=torch.ones(1),
    )
    linear = Site(0, first.name)
    affine = Affine(linear, torch.ones(d_out), None)
    low_rank = LowRank(linear, torch.zeros(1, d_in), torch.zeros(d_out, 1), 1.0)
    return LoweredAdapter("", (affine, low_rank, bottleneck))


def _one_token(slot: int) -> Batch:
    one = torch.ones(1, dtype=torch.int32)
    adapter_rows = AdapterRows(torch.zeros(1, dtype=torch.int32), torch.tensor([slot], dtype=torch.int32), 1)
    return Batch(
        token_ids=torch.zeros(1, dtype=torch.int64),
        positions=torch.zeros(1, dtype=torch.int64),
        slot_mapping=torch.zeros(1, dtype=torch.int64),
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        context_len=one,
        block_tables=torch.zeros((1, 1), dtype=torch.int32),
        tiles=torch.tensor([[0, 0, 1]], dtype=torch.int32),
        adapter_rows=adapter_rows,
        logit_adapter_rows=adapter_rows,
        logit_rows=torch.zeros(1, dtype=torch.int64),
    )
