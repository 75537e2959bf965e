"""What is wanted from a step's logits, known before the step is launched, and the outcome."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Logits = npt.NDArray[np.float32]
Hidden = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """How S rows choose their tokens; ``SamplingParams`` says what each filter does.

    The tokens of a row whose logits change are its *edits*. In this order: ``+ bias``; repetition penalty, for those
    that are ``seen``: ``l / r`` where ``l > 0``, else ``l · r`` (arXiv:1909.05858 as transformers and vLLM do it);
    presence, ``l - p`` where the count is over 0; frequency, ``l - f · count``. Of two edits for one token the later
    counts.

    Attributes:
        rows: [S] int32, indices of logit rows.
        temperature: [S] float32; 0 chooses the largest logit, the smallest id among equals.
        top_k: [S] int64; 0 for all.
        top_p: [S] float64. min_p, typical_p: the same.
        point: [S] float64 in [0, 1): the token is the first, in order of ids, whose cumulative probability exceeds it.
        num_logprobs: [S] int32; -1 for no log-probabilities, 0 for the token's own, k for the k most likely too.
        repetition_penalty: [S] float64; 1 for none.
        presence_penalty: [S] float64. frequency_penalty: the same.
        edit_start: [S + 1] int64, each row's first edit.
        edit_ids: [E] int64 in [0, V).
        edit_bias: [E] float32; -∞ for a token that may not come.
        edit_seen: [E] bool, whether it is in prompt or output.
        edit_counts: [E] float64, how often it is in the output.
        mask_rows: [S] int64, each row's mask; -1 for none.
        masks: [K, ⌈V / 32⌉] int32, the tokens that may come, bit by bit from the lowest.
    """

    rows: Array
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    typical_p: Array
    point: Array
    num_logprobs: Array
    repetition_penalty: Array
    presence_penalty: Array
    frequency_penalty: Array
    edit_start: Array
    edit_ids: Array
    edit_bias: Array
    edit_seen: Array
    edit_counts: Array
    mask_rows: Array
    masks: Array

    @property
    def num_rows(self) -> int:
        """S."""
        return int(self.rows.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Tokens whose log-probabilities are wanted.

    Attributes:
        rows: [T] int64, the logit row of each.
        ids: [T] int64 in [0, V).
        num_top: [T] int64, how many of the row's most likely tokens to return with each.
    """

    rows: Array
    ids: Array
    num_top: Array


NO_TARGETS = Targets(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
"""None."""


@dataclass(frozen=True, slots=True, eq=False)
class Wants:
    """What is wanted from the logits [M, V] of a step.

    Attributes:
        choices: rows that choose a token.
        targets: given tokens whose log-probabilities are wanted.
        whole: [W] int32, rows whose logits are returned whole.
    """

    choices: Choices
    targets: Targets
    whole: Array


NO_WANTS = Wants(
    Choices(
        rows=np.empty(0, np.int32),
        temperature=np.empty(0, np.float32),
        top_k=np.empty(0, np.int64),
        top_p=np.empty(0),
        min_p=np.empty(0),
        typical_p=np.empty(0),
        point=np.empty(0),
        num_logprobs=np.empty(0, np.int32),
        repetition_penalty=np.empty(0),
        presence_penalty=np.empty(0),
        frequency_penalty=np.empty(0),
        edit_start=np.zeros(1, np.int64),
        edit_ids=np.empty(0, np.int64),
        edit_bias=np.empty(0, np.float32),
        edit_seen=np.empty(0, np.bool_),
        edit_counts=np.empty(0),
        mask_rows=np.empty(0, np.int64),
        masks=np.empty((0, 0), np.int32),
    ),
    NO_TARGETS,
    np.empty(0, np.int32),
)
"""Nothing."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability, from raw logits.

    The most likely tokens are arrays, which for thousands of rows take a tenth of the memory of tuples.

    Attributes:
        logprob: natural.
        rank: 1 + how many tokens are strictly more likely.
        top_ids: of the most likely, best first, ties by id.
        top_logprobs: those of ``top_ids``.
    """

    logprob: float
    rank: int
    top_ids: array[int] = field(default_factory=lambda: array("q"))
    top_logprobs: array[float] = field(default_factory=lambda: array("d"))

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """(token id, log-probability) of the most likely tokens."""
        return tuple(zip(self.top_ids, self.top_logprobs, strict=True))


@dataclass(frozen=True, slots=True)
class Token:
    """A chosen token: -1 if none was allowed; ``logprob`` if it was wanted."""

    id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The outcome of a step.

    Attributes:
        tokens: S, one for each row of ``choices``.
        targets: T, one for each of ``targets``.
        whole: [W, V] float32, a copy.
        bad_rows: logit rows with a NaN or an infinity; other results for these are meaningless.
        hidden: [H, E] float32, a copy of the plan's hidden rows, as the output head reads them.
    """

    tokens: Sequence[Token]
    targets: Sequence[TokenLogprob]
    whole: Logits
    bad_rows: frozenset[int]
    hidden: Hidden = field(default_factory=lambda: np.empty((0, 0), np.float32))


def check_ids(token_ids: npt.ArrayLike, vocab_size: int) -> None:
    """Check that ids are tokens: kernels do not check indices.

    Raises:
        IndexError: one is outside the vocabulary.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if ((ids < 0) | (ids >= vocab_size)).any():
        raise IndexError(f"a token id is outside the vocabulary of {vocab_size}")
