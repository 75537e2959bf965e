"""One scoring in the engine: the log-probability of each continuation after a prompt that is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from manyhats.engine.backends.backend import Kernels
from manyhats.engine.backends.logprobs import token_logprobs
from manyhats.engine.loop.jobs import Output, SampledToken, token_output
from manyhats.engine.loop.serving import ServingModel, Start, new_sequence
from manyhats.engine.output import ScoredContinuation, ScoreOutput, TokenOutput, Usage
from manyhats.engine.request import ScoreRequest
from manyhats.engine.sampling.sampler import SamplingRow
from manyhats.engine.scheduling.blocks import SharedPrefix
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence

_MAX_QUEUED = 64
"""Continuations of one request in the scheduler at a time; fewer where those have enough tokens for a step."""


@dataclass(slots=True, eq=False)
class _Branch:
    """One continuation: its tokens, how many of the first are given, and those whose log-probability is found."""

    token_ids: tuple[int, ...]
    num_given: int
    tokens: list[TokenOutput] = field(default_factory=list)


class Scoring:
    """A ``Job`` that samples nothing.

    First the prompt runs alone: its last logits are those of every continuation's first token. Its KV is then shared
    by one sequence for each continuation of more tokens, which runs all but the last of them. A single continuation
    runs with its prompt.
    """

    def __init__(self, job_id: str, request: ScoreRequest, start: Start, model: ServingModel) -> None:
        self.id = job_id
        self.deadline_s = request.deadline_s
        self.is_done = False
        self.samples = False
        self._request = request
        self._start = start
        self._model = model
        self._tokenizer = model.tokenizer_of(request)
        num_given = request.num_given or (0,) * len(request.continuations)
        self._branches = [_Branch(*each) for each in zip(request.continuations, num_given, strict=True)]
        self._unqueued: Iterator[_Branch] = iter(())
        self._running: dict[Sequence, _Branch] = {}
        self._prompt: Sequence | None = None
        self._prefix: SharedPrefix | None = None
        self._is_bulk = self._has_many_rows = False
        self._num_done = 0
        self._usage = Usage(prompt_tokens=len(request.prompt_token_ids), adapter_load_s=start.adapter_load_s)
        self._started_s: float | None = None

    def start(self, scheduler: Scheduler) -> None:
        """Queues the prompt, or all at once where there is one continuation."""
        limits = scheduler.config
        num_scored = sum(len(token_ids) for token_ids in self._request.continuations)
        self._has_many_rows = num_scored > limits.max_bulk_tokens
        self._is_bulk = self._request.num_tokens > limits.max_num_batched_tokens
        if len(self._branches) > 1:
            self._prompt = self._sequence(self._request.prompt_token_ids)
            self._prompt.logits_from = self._num_context_tokens - 1
            scheduler.add(self._prompt)
        else:
            scheduler.add(self._new_branch_sequence(self._branches[0]))

    def tick(self, scheduler: Scheduler, now_s: float) -> Output | None:
        """Nothing to do between steps."""
        return None

    def begin(self, sequence: Sequence, now_s: float) -> None:
        """Notes when the request left the queue."""
        if self._started_s is None:
            self._started_s = now_s
            self._usage = replace(
                self._usage,
                queue_s=now_s - self._request.accepted_s,
                cached_prompt_tokens=min(sequence.num_cached_tokens, len(self._request.prompt_token_ids)),
            )

    def sampling_row(self, sequence: Sequence) -> SamplingRow:
        """Never asked for."""
        raise TypeError("a scoring samples nothing")

    def score(
        self, sequence: Sequence, first_position: int, logits: Tensor, kernels: Kernels[Any, Any]
    ) -> None:
        """Keeps the log-probabilities of the continuations' tokens."""
        num_top = self._request.response.top_logprobs
        if sequence is self._prompt:
            firsts = [branch.token_ids[0] for branch in self._branches]
            found = token_logprobs(logits, firsts, num_top, kernels, rows=[0] * len(firsts))
            for branch, token_id, logprob in zip(self._branches, firsts, found, strict=True):
                branch.tokens.append(token_output(self._tokenizer, token_id, logprob))
            return
        branch = self._running[sequence]
        start = first_position + 1 - self._num_context_tokens
        targets = branch.token_ids[start : start + logits.shape[0]]
        found = token_logprobs(logits, targets, num_top, kernels)
        branch.tokens += [token_output(self._tokenizer, *each) for each in zip(targets, found, strict=True)]

    def commit(
        self, sequence: Sequence, sampled: SampledToken | None, scheduler: Scheduler, now_s: float
    ) -> Output | None:
        """Starts the continuations once the prompt is there, more as others finish; answers when the last one is."""
        if sequence is self._prompt:
            self._prefix = scheduler.hold(sequence, sequence.num_tokens)
            scheduler.finish(sequence)
            self._prompt = None
            self._usage = replace(self._usage, prefill_s=now_s - (self._started_s or now_s))
            longer = [branch for branch in self._branches if len(branch.token_ids) > 1]
            self._num_done = len(self._branches) - len(longer)
            self._unqueued = iter(longer)
        else:
            del self._running[sequence]
            scheduler.finish(sequence)
            self._num_done += 1
        self._queue_branches(scheduler, now_s)
        if self._num_done < len(self._branches):
            return None
        self.is_done = True
        self.abort(scheduler)
        return self._output(now_s)

    def abort(self, scheduler: Scheduler) -> None:
        """Frees every sequence's blocks and the shared prompt's."""
        if self._prompt is not None:
            scheduler.finish(self._prompt)
        for sequence in self._running:
            scheduler.finish(sequence)
        if self._prefix is not None:
            scheduler.release(self._prefix)

    def _queue_branches(self, scheduler: Scheduler, now_s: float) -> None:
        """Queues what makes up a step, as requests that come now: those that came before have their turn first."""
        while (
            len(self._running) < _MAX_QUEUED
            and self._num_queued_tokens < scheduler.config.max_num_batched_tokens
        ):
            branch = next(self._unqueued, None)
            if branch is None:
                return
            sequence = self._new_branch_sequence(branch)
            sequence.is_continuation = True
            sequence.arrival = now_s
            scheduler.add(sequence)

    @property
    def _num_queued_tokens(self) -> int:
        """Of the continuations that are in the scheduler."""
        return sum(len(branch.token_ids) - 1 for branch in self._running.values())

    @property
    def _num_context_tokens(self) -> int:
        """Virtual tokens and prompt."""
        return self._start.num_virtual_tokens + len(self._request.prompt_token_ids)

    def _new_branch_sequence(self, branch: _Branch) -> Sequence:
        sequence = self._sequence(self._request.prompt_token_ids + branch.token_ids[:-1])
        sequence.logits_from = self._num_context_tokens - 1 + len(branch.tokens)
        if len(self._branches) > 1:  # else the rows are those of this sequence, which it is told by
            sequence.is_bulk = self._is_bulk or self._has_many_rows
        self._running[sequence] = branch
        return sequence

    def _sequence(self, token_ids: tuple[int, ...]) -> Sequence:
        """A sequence that starts from the shared prompt once that is there."""
        sequence = new_sequence(self.id, self._request, token_ids, 0, self._start, self._model, self._prefix)
        sequence.is_bulk = self._is_bulk
        return sequence

    def _output(self, now_s: float) -> ScoreOutput:
        started = self._started_s or now_s
        self._usage = replace(self._usage, decode_s=now_s - started - self._usage.prefill_s)
        return ScoreOutput([self._scored(branch) for branch in self._branches], self._usage)

    def _scored(self, branch: _Branch) -> ScoredContinuation:
        tokens = tuple(branch.tokens[branch.num_given :])
        return ScoredContinuation(sum(token.logprob or 0.0 for token in tokens), tokens)
