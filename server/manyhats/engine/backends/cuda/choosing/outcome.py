"""From the bytes that a step's kernels left to its ``Outcome``."""

from __future__ import annotations

from array import array

import numpy as np

from manyhats.engine.backends.cuda.choosing.wanted import Bytes, Found, Pairs
from manyhats.engine.backends.wants import Outcome, Token, TokenLogprob


def outcome_of(found: Found, pairs: Pairs, buffer: Bytes) -> Outcome:
    """The outcome; it shares nothing with the buffer."""
    logprobs = _logprobs(found, pairs, buffer)
    num_targets = pairs.num - len(pairs.choices)
    of_choices = dict(zip(pairs.choices.tolist(), logprobs[num_targets:], strict=True))
    ids = found.tokens.of(buffer).tolist()
    return Outcome(
        tokens=[
            Token(token_id, of_choices.get(choice) if token_id >= 0 else None)
            for choice, token_id in enumerate(ids)
        ],
        targets=logprobs[:num_targets],
        whole=found.whole.of(buffer).copy(),
        bad_rows=frozenset(np.flatnonzero(found.bad.of(buffer).any(axis=1)).tolist()),
        hidden=found.hidden.of(buffer).copy(),
    )


def _logprobs(found: Found, pairs: Pairs, buffer: Bytes) -> list[TokenLogprob]:
    """One for each pair; meaningless for a choice that has no token."""
    top_ids = found.top_ids.of(buffer).astype(np.int64)
    top_logprobs = found.top_logprobs.of(buffer)
    ends = pairs.ends.tolist()
    logprobs, ranks = (field.of(buffer).tolist() for field in (found.logprobs, found.ranks))
    return [
        TokenLogprob(
            logprob,
            rank,
            array("q", top_ids[first:last].tobytes()),
            array("d", top_logprobs[first:last].tobytes()),
        )
        for logprob, rank, first, last in zip(logprobs, ranks, ends[:-1], ends[1:], strict=True)
    ]
