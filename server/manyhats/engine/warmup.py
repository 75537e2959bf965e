"""One small batch before the first request: kernels are compiled or loaded, and the model proves that it runs."""

from __future__ import annotations

from typing import Any

import torch

from manyhats.engine.batch import AdapterRows, Batch
from manyhats.engine.errors import ModelError
from manyhats.engine.kernels.interface import AdapterSlots, Kernels, KVCache
from manyhats.engine.model.decoder import Decoder


def warm_up(decoder: Decoder, cache: KVCache, slots: AdapterSlots, kernels: Kernels[Any, Any]) -> None:
    """Runs one token through the decoder, and every adapter kernel over an empty slot.

    Call it before the cache holds anything: it writes to block 0.

    Raises:
        ModelError: the logits are not finite.
    """
    kernels.start_thread()
    one = torch.ones(1, dtype=torch.int32)
    adapter_rows = AdapterRows(torch.zeros(1, dtype=torch.int32), one, 1)
    batch = Batch(
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
    with torch.inference_mode():
        logits = decoder.forward(batch, cache, slots)
    if not torch.isfinite(logits).all():
        raise ModelError("the model's logits are not finite: are its weights whole?")
