"""A model on a device, run as ``model.forward`` states it, on all rows at once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from manyhats.engine.backends.own_logits import OwnRows
from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.backends.torch.batched.adapters import DeviceAdapterSlots
from manyhats.engine.backends.torch.batched.batch import Batch
from manyhats.engine.backends.torch.batched.logits import DeviceLogits
from manyhats.engine.backends.torch.batched.maths import BatchedMaths
from manyhats.engine.backends.torch.batched.weights import DeviceWeights
from manyhats.engine.backends.torch.cache import TorchKVCache
from manyhats.engine.backends.warmup import run_one
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.forward import block, embedded, entered, left, logits, scaled_logits
from manyhats.engine.model.weights import Weights
from manyhats.engine.progress import Progress


class BatchedModel:
    """``Model`` in plain torch.

    How a row's sums are rounded may depend on the number of rows: the invariant of ``backends.backend`` holds up to
    rounding only.

    Args:
        architecture: what is computed.
        weights: in host memory.
        dtype: of linears: ``bfloat16``, or ``float32`` for exact products.
        device: where.
    """

    def __init__(
        self, architecture: Architecture, weights: Weights, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.architecture = architecture
        self._device = device
        self._weights = DeviceWeights(architecture, weights, dtype, device)

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """Resident bytes: the layers' linears, and embedding, head and norms."""
        return self._weights.num_bytes

    def warm_up(
        self, cache: TorchKVCache, adapters: DeviceAdapterSlots, slot: int, progress: Progress
    ) -> None:
        """Nothing is compiled; proves that the model runs."""
        run_one(self, cache, adapters, slot)

    @torch.inference_mode()
    def forward(self, plan: StepPlan, cache: TorchKVCache, adapters: DeviceAdapterSlots) -> DeviceLogits:
        """Launches a step, which writes its keys and values."""
        architecture, norms = self.architecture, self._weights.norms
        cache.copy_blocks(plan)
        batch = Batch(plan, self._device)
        maths = BatchedMaths(self._weights, batch, cache, adapters)
        x = embedded(maths, architecture.embedding, batch.token_ids)
        batch.put(x, plan.embeddings)
        stream = entered(maths, architecture, norms, x)
        for layer, spec in enumerate(architecture.blocks):
            stream = block(maths, spec, norms.blocks[layer], layer, stream)
        leave = partial(left, maths, architecture, norms.final_norm)
        hidden = leave(stream.index_select(0, batch.hidden_rows))
        if architecture.head is None:
            return DeviceLogits(stream.new_empty(0, 0), hidden)
        found = logits(maths, architecture.head, leave(stream.index_select(0, batch.logit_rows)))
        own = [OwnRows(each.rows, scaled_logits(each.values, architecture.head)) for each in maths.own]
        return DeviceLogits(found, hidden, own)
