"""Chooses tokens as a step does, on kernels alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.wants import NO_TARGETS, TokenLogprob, Wants
from manyhats.engine.errors import NoTokenAllowedError
from manyhats.engine.sampling.sampler import SamplingRow, check_row, choices_of


@dataclass(frozen=True)
class Sampled:
    """One token per row, -1 for those that failed, and its log-probability where asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    failures: Mapping[int, Exception] = field(default_factory=dict)


def sample(logits: Tensor, rows: Sequence[SamplingRow], kernels: Any) -> Sampled:
    """Choose one token per row; what a row fails with ends that row."""
    failures: dict[int, Exception] = {}
    for index, row in enumerate(rows):
        try:
            check_row(row, logits.shape[1])
        except Exception as error:  # noqa: BLE001 whatever it is
            failures[index] = error
    sound = [index for index in range(len(rows)) if index not in failures]
    choices = choices_of([rows[index] for index in sound], sound, logits.shape[1])
    outcome = HostLogits(logits, kernels).finish(Wants(choices, NO_TARGETS, np.empty(0, np.int32))).result()
    tokens = dict(zip(sound, outcome.tokens, strict=True))
    failures |= {index: NoTokenAllowedError() for index, token in tokens.items() if token.id < 0}
    return Sampled(
        [tokens[index].id if index in tokens else -1 for index in range(len(rows))],
        [tokens[index].logprob if index in tokens else None for index in range(len(rows))],
        failures,
    )


def mask_of(allowed: Sequence[bool]) -> npt.NDArray[np.int32]:
    """The words of a mask."""
    bits = np.packbits(np.array(allowed, dtype=np.bool_), bitorder="little")
    words = np.zeros(-(-len(allowed) // 32) * 4, np.uint8)
    words[: bits.size] = bits
    return words.view(np.int32)
