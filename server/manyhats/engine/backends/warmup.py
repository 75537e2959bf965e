"""One token before the first request: compiles or loads what steps need, and proves that the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from manyhats.adapters.primitives import Affine, Bottleneck, BottleneckInput, LoweredAdapter, LowRank
from manyhats.adapters.sites import Site
from manyhats.engine.backends.backend import Logits, Model
from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.backends.wants import NO_TARGETS, NO_WANTS, Choices, Wants
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture


def run_one(
    model: Model[Any, Any],
    cache: Any,
    adapters: Any,
    slot: int,
    before_choosing: Callable[[], None] = lambda: None,
) -> None:
    """Run one token on an adapter that uses every kernel, and choose the next in a way that uses all of the choosing.

    Call it while the cache is empty: it writes to block 0. ``before_choosing`` is called between the two.

    Raises:
        ModelError: the logits are not finite.
    """
    adapters.place(slot, adapters.pack(every_primitive(model.architecture)))
    try:
        _check(
            model,
            model.forward(_one_token(slot, model.architecture.head is None), cache, adapters),
            before_choosing,
        )
    finally:
        adapters.clear(slot)  # after the step that names it


def _check(model: Model[Any, Any], logits: Logits, before_choosing: Callable[[], None]) -> None:
    before_choosing()
    if model.architecture.head is None:
        if not np.isfinite(logits.finish(NO_WANTS).result().hidden).all():
            raise ModelError("the model's hidden values are not finite: are its weights intact?")
        return
    if logits.finish(every_filter()).result().bad_rows:
        raise ModelError("the model's logits are not finite: are its weights intact?")


def every_primitive(architecture: Architecture) -> LoweredAdapter:
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
    block = architecture.blocks[0]
    fed = block.feed_forward_groups() if block.feed_forward.experts is None else ()
    linears = [group.members[0] for group in (*block.attention_groups(), *fed)]
    low_ranks = [
        LowRank(Site(0, each.name), torch.zeros(1, each.d_in), torch.zeros(each.d_out, 1), 1.0)
        for each in linears
    ]
    return LoweredAdapter("", (Affine(Site(0, first.name), torch.ones(d_out), None), *low_ranks, bottleneck))


def every_filter() -> Wants:
    """One row that samples from its most likely tokens, and wants log-probabilities."""
    return Wants(
        choices=Choices(
            rows=int32([0]),
            temperature=np.ones(1, np.float32),
            top_k=np.zeros(1, np.int64),
            top_p=np.array([0.5]),
            min_p=np.zeros(1),
            typical_p=np.ones(1),
            point=np.zeros(1),
            num_logprobs=int32([1]),
            repetition_penalty=np.ones(1),
            presence_penalty=np.zeros(1),
            frequency_penalty=np.zeros(1),
            edit_start=np.zeros(2, np.int64),
            edit_ids=np.empty(0, np.int64),
            edit_bias=np.empty(0, np.float32),
            edit_seen=np.empty(0, np.bool_),
            edit_counts=np.empty(0),
            mask_rows=np.array([-1]),
            masks=np.empty((0, 0), np.int32),
        ),
        targets=NO_TARGETS,
        whole=int32([]),
    )


def _one_token(slot: int, is_encoder: bool) -> StepPlan:
    return StepPlan(
        token_ids=int32([0]),
        positions=int32([0]),
        cells=np.zeros(1, np.int64),
        query_start=int32([0, 1]),
        context_len=int32([1]),
        block_tables=int32([[0]]),
        row_slots=int32([slot]),
        logit_rows=int32([] if is_encoder else [0]),
        hidden_rows=int32([0] if is_encoder else []),
        token_types=int32([0]),
    )
