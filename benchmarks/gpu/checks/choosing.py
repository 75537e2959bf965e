"""K12 and K13: which token comes, and how likely tokens are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.gpu.checks.check import Check, Place
from manyhats.engine.backends.cuda.choosing.choose import Choosing
from manyhats.engine.backends.cuda.choosing.logits import DeviceLogits, Finisher
from manyhats.engine.backends.cuda.runtime import runtime_on
from manyhats.engine.backends.torch.choosing import choose_row
from manyhats.engine.backends.wants import Targets, Wants
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.sampler import SamplingRow, choices_of

_PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=20),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=1.0, typical_p=0.8),
    SamplingParams(temperature=1.0, logit_bias={3: 4.0}),
)


def check_choosing(place: Place) -> Iterator[Check]:
    """Each filter by itself, a bias, and log-probabilities; a draw near a boundary may fall on either side."""
    vocab, count = place.shape.vocab_size, len(_PARAMS)
    logits = place.normal(60, count, vocab, scale=3.0)
    rows = [SamplingRow(params=params, seed=7, step=index) for index, params in enumerate(_PARAMS)]
    choices = choices_of(rows, range(count), vocab)
    targets = Targets(np.arange(count), np.arange(count) * 3 % vocab, np.full(count, 2))
    wants = Wants(choices, targets, np.empty(0, np.int32))
    finisher = Finisher(Choosing(place.device, count, count, vocab), runtime_on(place.device))
    host = logits.cpu()
    outcome = DeviceLogits(logits, finisher).finish(wants).result()
    expected = [choose_row(host[row], choices, row) for row in range(count)]
    wrong = sum(token.id != right for token, right in zip(outcome.tokens, expected, strict=True))
    yield Check("K12 choose, tokens that differ", wrong, 0.0)
    exact = torch.log_softmax(host.double(), 1)
    found = [target.logprob for target in outcome.targets]
    right = exact[torch.arange(count), torch.from_numpy(targets.ids)]
    error = float((torch.tensor(found, dtype=torch.float64) - right).abs().max())
    yield Check("K13 logprobs, nats", error, 1e-5)
    yield Check("K13 logprobs, rows not finite", len(outcome.bad_rows), 0.0)
