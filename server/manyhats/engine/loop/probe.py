"""How far an adapter moves the base model's answers: one short prompt runs on both, alongside requests."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError
from manyhats.adapters.primitives import (
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    LoweredAdapter,
)
from manyhats.engine.backends.backend import AdapterSlots
from manyhats.engine.backends.wants import Logits
from manyhats.engine.errors import NumericalError
from manyhats.engine.loop.private_run import PrivateRun
from manyhats.engine.loop.thread import Loop
from manyhats.engine.residency.tiers import DeviceTier
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens
from manyhats.engine.text.tokenizer import Tokenizer

_TEXT = "The best way to learn a new language is to listen"
_NUM_FIXED_TOKENS = 8
_MAX_OWN_TOKENS = 4


class AdapterProbe:
    """Measures adapters on one engine, one at a time, from any thread but the engine's own.

    Args:
        loop: runs the prompts.
        slots: the engine's.
        tier: makes room on the device.
        slot: reserved for probes, so that they neither evict an adapter nor wait for one.
        prompt: the fixed token ids.
        embeddings: [V, D], the base's.
        max_context_length: the engine's.
        is_encoder: whether the base has no logits; hidden values are compared then.
    """

    def __init__(
        self,
        loop: Loop,
        slots: AdapterSlots[Any],
        tier: DeviceTier,
        slot: int,
        *,
        prompt: tuple[int, ...],
        embeddings: Tensor,
        max_context_length: int,
        is_encoder: bool = False,
    ) -> None:
        self._loop = loop
        self._slots = slots
        self._tier = tier
        self._slot = slot
        self._prompt = prompt
        self._embeddings = embeddings
        self._max_context_length = max_context_length
        self._is_encoder = is_encoder
        self._lock = threading.Lock()
        self._prompt_logits: Logits | None = None  # the base's, of ``prompt`` alone

    def measure(self, adapter: LoweredAdapter) -> float:
        """The mean, over the prompt's positions, of the largest change of any token's log-probability, in nats.

        On an encoder, of any hidden value, in units of the row's root mean square.

        If the adapter changes embeddings, the prompt ends with tokens it changes. A row's logits depend on that row
        alone, bit for bit, so an adapter that changes nothing gives exactly 0.

        Raises:
            AdapterInvalidError: its logits are not finite, but the base's are.
            AdapterTooLargeError: its virtual tokens leave no room for the prompt, or the device has none for it.
            EngineError: the engine cannot run it, or has ended.
        """
        token_ids = (*self._prompt, *changed_tokens(adapter.deltas, self._embeddings, _MAX_OWN_TOKENS))
        self._check_room(adapter, len(token_ids))
        with self._lock:
            before, after = self._base_logits(token_ids), self._adapter_logits(adapter, token_ids)
        return hidden_effect(before, after) if self._is_encoder else effect(before, after)

    def _check_room(self, adapter: LoweredAdapter, num_tokens: int) -> None:
        num_virtual = 0 if adapter.prefix is None else adapter.prefix.num_virtual_tokens
        if num_virtual + num_tokens > self._max_context_length:
            raise AdapterTooLargeError(
                "num_virtual_tokens",
                f"are {num_virtual}, which leaves no room for a prompt of {num_tokens} tokens "
                f"in a context of {self._max_context_length}",
            )

    def _base_logits(self, token_ids: tuple[int, ...]) -> Logits:
        if token_ids != self._prompt:
            return self._run(token_ids)
        if self._prompt_logits is None:
            self._prompt_logits = self._run(token_ids)
        return self._prompt_logits

    def _adapter_logits(self, adapter: LoweredAdapter, token_ids: tuple[int, ...]) -> Logits:
        try:
            with self._tier.holding(
                self._slot, self._slots.pack(adapter)
            ):  # a run's steps end before it does
                virtual = None if adapter.prefix is None else VirtualTokens(adapter.prefix)
                return self._run(token_ids, self._slot, virtual)
        except NumericalError as error:
            raise AdapterInvalidError(
                "logits", "are not finite with this adapter, but are without it: its values overflow"
            ) from error

    def _run(self, token_ids: tuple[int, ...], slot: int = 0, virtual: VirtualTokens | None = None) -> Logits:
        run = PrivateRun(self._loop.new_id(), token_ids, slot, virtual, is_whole=self._is_encoder)
        return self._loop.run(run)


def probe_prompt(tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """The fixed token ids: plain English, as the tokenizer encodes a text, without ids the model lacks."""
    token_ids = tokenizer.encode(_TEXT, add_special_tokens=True)
    return tuple(token_id for token_id in token_ids if token_id < vocab_size)[:_NUM_FIXED_TOKENS] or (0,)


def changed_tokens(deltas: Iterable[Delta], embeddings: Tensor, count: int) -> tuple[int, ...]:
    """The tokens whose embeddings deltas change most, at most ``count``; only trained tokens may change at all.

    Changes to the output head need no such care: they show at every position.
    """
    sizes = torch.zeros(embeddings.shape[0])
    for delta in deltas:
        if isinstance(delta, EmbeddingRows):
            is_known = delta.ids < embeddings.shape[0]  # others the base cannot read
            ids, rows = delta.ids[is_known], delta.rows[is_known]
            sizes[ids] += (rows.float() - embeddings[ids].float()).norm(dim=1)
        elif isinstance(delta, EmbeddingLowRank):
            a, b = delta.a.float(), delta.b.float()
            squares = ((a @ (b.t() @ b)) * a).sum(dim=1)  # |A[id] Bᵀ|², without the [V, D] product
            sizes += abs(delta.scale) * squares.clamp(min=0).sqrt()
    largest = sizes.topk(min(count, sizes.numel()))
    return tuple(
        token for token, size in zip(largest.indices.tolist(), largest.values.tolist(), strict=True) if size
    )


def effect(before: Logits, after: Logits) -> float:
    """``mean_t max_v |log softmax(after)[t, v] − log softmax(before)[t, v]|`` for logits [T, V], in nats.

    Over the tokens that both have.
    """
    changes = []
    common = min(before.shape[1], after.shape[1])
    for old, new in zip(before, after, strict=True):
        moved = new[:common].astype(np.float64) - old[:common]
        shift = _log_total(new) - _log_total(old)
        changes.append(max(float(moved.max()) - shift, shift - float(moved.min())))
    return float(np.mean(changes))


def hidden_effect(before: Logits, after: Logits) -> float:
    """``mean_t max_d |after[t, d] − before[t, d]| / RMS(before[t])`` for hidden values [T, D]."""
    sizes = np.sqrt(np.square(before.astype(np.float64)).mean(axis=1))
    changes = np.abs(after.astype(np.float64) - before).max(axis=1)
    return float(np.mean(changes / np.maximum(sizes, 1e-12)))


def _log_total(logits: Logits) -> float:
    largest = logits.max()
    return float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
