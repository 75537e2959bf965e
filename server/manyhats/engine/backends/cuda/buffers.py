"""The memory that a step works in: made once for the largest, at addresses that do not change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from manyhats.engine.backends.cuda.adapters.layout import LargestSizes, RecordLayout
from manyhats.engine.backends.cuda.adapters.step import Workspace
from manyhats.engine.backends.cuda.attention.attend import Parts
from manyhats.engine.backends.cuda.experts.mixture import MixtureBuffers
from manyhats.engine.backends.cuda.linears.linear import CudaLinear, LinearWorkspace
from manyhats.engine.model.architecture import Architecture


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """Rows of a step, R at most; N of them are used. They are float32 where nothing else is said.

    Attributes:
        embedded: [R, E] bfloat16, rows of the embedding.
        entering: [R, E], the same times their scale, and as adapters have them.
        stream: [R, D], the residual stream.
        before: [R, D], the stream ahead of a sub-layer, where that is needed afterwards.
        x: [R, D] bfloat16, what a sub-layer reads.
        qkv: [R, (H + 2 · Hkv) · K] bfloat16.
        queries: [R, H · K] bfloat16, normed and rotated.
        mixed: [R, H · K] bfloat16, the attention's result.
        gate_up: [R, I or 2 · I] bfloat16.
        inside: [R, I] bfloat16, activated.
        output: [R, D], of the attention, or of the feed-forward behind it.
        beside: [R, D], of a feed-forward that reads the stream as it was before the attention.
        last: [R, D], the rows of the stream that leave the model.
        left: [R, E], the same normed and projected.
        read: [R, E] bfloat16, what the output head reads.
        logits: [R, V].
        chosen: [S] int32, the tokens of the last step's choices.
        parts: of the attention.
        linear: of linears.
        adapters: of adapters.
        mixture: of experts; None if no layer has some.
    """

    embedded: Tensor
    entering: Tensor
    stream: Tensor
    before: Tensor
    x: Tensor
    qkv: Tensor
    queries: Tensor
    mixed: Tensor
    gate_up: Tensor
    inside: Tensor
    output: Tensor
    beside: Tensor
    last: Tensor
    left: Tensor
    read: Tensor
    logits: Tensor
    chosen: Tensor
    parts: Parts
    linear: LinearWorkspace
    adapters: Workspace
    mixture: MixtureBuffers | None

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        linears: Iterable[CudaLinear],
        max_rows: int,
        max_choices: int,
        max_slots: int,
        largest: LargestSizes,
        device: torch.device,
    ) -> Buffers:
        """For steps of so many rows, whose attention has so many parts."""
        attention, feed_forwards = architecture.attention, [each.feed_forward for each in architecture.blocks]
        plain = [each for each in feed_forwards if each.experts is None]
        width = max((each.width for each in plain), default=0)
        first = max((each.width * (1 + each.is_gated) for each in plain), default=0)
        mixture = next((each for each in feed_forwards if each.experts is not None), None)
        size, entering, left = architecture.hidden_size, architecture.embedding.size, architecture.read_size
        heads, keys = attention.query_size, attention.key_size
        logits = 0 if architecture.head is None else architecture.vocab_size
        is_parallel = any(each.is_parallel for each in architecture.blocks)

        def rows(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
            # Rows that only fill up a step are in nobody's work; zeros keep what is computed of them finite.
            return torch.zeros(max_rows, columns, dtype=dtype, device=device)

        bf16 = torch.bfloat16
        return cls(
            embedded=rows(entering, bf16),
            entering=rows(entering),
            stream=rows(size),
            before=rows(size),
            x=rows(size, bf16),
            qkv=rows(heads + 2 * keys, bf16),
            queries=rows(heads, bf16),
            mixed=rows(heads, bf16),
            gate_up=rows(first, bf16),
            inside=rows(width, bf16),
            output=rows(size),
            beside=rows(size if is_parallel else 0),
            last=rows(size),
            left=rows(left),
            read=rows(left, bf16),
            logits=rows(logits),
            chosen=torch.zeros(max_choices, dtype=torch.int32, device=device),
            parts=Parts(
                torch.empty(max_slots, attention.num_heads, attention.head_dim, device=device),
                torch.empty(max_slots, attention.num_heads, 2, device=device),
            ),
            linear=LinearWorkspace.of(linears, max_rows, device),
            adapters=Workspace.of(max_rows, RecordLayout(architecture), largest, device),
            mixture=None if mixture is None else MixtureBuffers.of(mixture, size, max_rows, device),
        )

    @property
    def num_bytes(self) -> int:
        """Of all of it."""
        tensors = [value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)]
        parts = (
            self.linear.num_bytes
            + self.adapters.num_bytes
            + self.parts.totals.nbytes
            + self.parts.stats.nbytes
        )
        mixture = 0 if self.mixture is None else self.mixture.num_bytes
        return parts + mixture + sum(tensor.nbytes for tensor in tensors)
