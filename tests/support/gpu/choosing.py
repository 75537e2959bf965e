"""Choosing and log-probabilities on a device, against the torch backend's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.choosing.choose import Choosing, Tiles
from manyhats.engine.backends.cuda.choosing.logits import DeviceLogits, Finisher
from manyhats.engine.backends.cuda.runtime import runtime_on
from manyhats.engine.backends.torch.choosing import choose_row
from manyhats.engine.backends.wants import NO_TARGETS, Choices, Outcome, Targets, Wants
from manyhats.engine.sampling.sampler import SamplingRow, choices_of
from support.gpu.interpreter import DEVICE

NEAR = 1e-6
"""So near a boundary, either side is right."""


def finisher(vocab_size: int, tiles: Tiles | None = None, rows: int = 9) -> Finisher:
    """For steps of a vocabulary; its memory has to grow."""
    runtime = runtime_on(torch.device(DEVICE))
    return Finisher(Choosing(runtime.device, rows, rows, vocab_size, tiles), runtime, room=64)


def wants_of(
    rows: Sequence[SamplingRow], vocab_size: int, targets: Targets = NO_TARGETS, whole: Sequence[int] = ()
) -> Wants:
    """One choice for each of the first rows of logits."""
    choices = choices_of(rows, range(len(rows)), vocab_size)
    return Wants(choices, targets, np.array(whole, np.int32))


def finish(logits: Tensor, wants: Wants, tiles: Tiles | None = None) -> Outcome:
    """The outcome of one step."""
    found = DeviceLogits(logits.to(DEVICE), finisher(logits.shape[1], tiles)).finish(wants)
    return found.result()


def chosen(logits: Tensor, rows: Sequence[SamplingRow], tiles: Tiles | None = None) -> list[int]:
    """The tokens that rows choose."""
    wants = wants_of(rows, logits.shape[1])
    return [token.id for token in finish(logits, wants, tiles).tokens]


def check_chosen(logits: Tensor, choices: Choices, token_ids: Sequence[int]) -> None:
    """Check that these are the torch backend's tokens, or that a number lies near a boundary."""
    for index, (row, token_id) in enumerate(zip(logits[choices.rows], token_ids, strict=True)):
        expected = choose_row(row, choices, index)
        assert token_id == expected or token_id in _near(row, choices, index), (index, token_id, expected)


def _near(row: Tensor, choices: Choices, index: int) -> set[int]:
    """What the torch backend chooses with numbers moved a little."""
    found = set()
    for point, top_p, typical_p, min_p in itertools.product((-NEAR, 0.0, NEAR), repeat=4):
        moved = replace(
            choices,
            point=np.clip(choices.point + point, 0, 1 - 2.0**-53),
            top_p=np.where(choices.top_p < 1, choices.top_p + top_p, 1.0),
            typical_p=np.where(choices.typical_p < 1, choices.typical_p + typical_p, 1.0),
            min_p=np.minimum(choices.min_p * (1 + min_p), 1.0),
        )
        found.add(choose_row(row, moved, index))
    return found
