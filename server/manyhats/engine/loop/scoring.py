"""One scoring in the engine: the log-probability of each continuation of a prompt that is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import repeat

from manyhats.engine.loop.job import Answer, Want, token_output
from manyhats.engine.loop.meter import Meter
from manyhats.engine.loop.serving import ServingModel, new_sequence
from manyhats.engine.output import ScoredContinuation, ScoreOutput, TokenOutput
from manyhats.engine.request import ScoreRequest
from manyhats.engine.residency.lease import Lease
from manyhats.engine.scheduling.blocks import SharedPrefix
from manyhats.engine.scheduling.schedule import Chunk
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence

_MAX_QUEUED = 64
"""How many continuations of one request are in the scheduler at a time; fewer if those fill a step."""


@dataclass(slots=True, eq=False)
class _Branch:
    """One continuation: its tokens, how many of the first are given, and those whose log-probability is known."""

    token_ids: tuple[int, ...]
    num_given: int
    tokens: list[TokenOutput] = field(default_factory=list)


class Scoring:
    """A ``Job`` that samples nothing.

    First the prompt runs alone: its last logits are those for every continuation's first token. Its KV is then shared
    by one sequence for each longer continuation, which runs all but the last of its tokens. A single continuation runs
    with its prompt.
    """

    def __init__(self, job_id: str, request: ScoreRequest, lease: Lease, model: ServingModel) -> None:
        self.id = job_id
        self.deadline_s = request.deadline_s
        self.is_done = False
        self._request = request
        self._lease = lease
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
        self._meter = Meter(request.accepted_s, len(request.prompt_token_ids), lease.load_s)
        self._is_queued = False

    def next(self, scheduler: Scheduler, now_s: float) -> None:
        """Queue the prompt, or everything at once if there is one continuation; later ones are queued as others end."""
        if not self._is_queued:
            self._is_queued = True
            self._queue_first(scheduler)

    def _queue_first(self, scheduler: Scheduler) -> None:
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

    def wants(self, chunk: Chunk) -> Want:
        """The log-probabilities of a continuation's tokens, or after the prompt of each one's first."""
        self._meter.start(chunk.sequence.num_cached_tokens)
        if len(self._branches) == 1:
            self._meter.end_prefill()
        rows, token_ids = self._targets(chunk)
        return Want(
            target_rows=rows,
            target_ids=token_ids,
            num_top=self._request.response.top_logprobs,
            vocab_size=self._lease.vocab_size,
        )

    def _targets(self, chunk: Chunk) -> tuple[Seq[int], Seq[int]]:
        """Rows of a chunk, and the tokens to score there."""
        num_rows = chunk.num_logit_rows
        if chunk.sequence is self._prompt:
            firsts = [branch.token_ids[0] for branch in self._branches] if num_rows else []
            return [0] * len(firsts), firsts
        start = chunk.end - num_rows + 1 - self._num_context_tokens
        token_ids = self._running[chunk.sequence].token_ids[start : start + num_rows] if num_rows else ()
        return range(len(token_ids)), token_ids

    def take(self, chunk: Chunk, answer: Answer, scheduler: Scheduler, now_s: float) -> ScoreOutput | None:
        """Keep the log-probabilities.

        Start the continuations once the prompt has run, more as others finish; answer when the last one has.
        """
        sequence = chunk.sequence
        is_prompt = sequence is self._prompt
        branches = self._branches if is_prompt else repeat(self._running[sequence])
        for branch, target in zip(branches, answer.targets, strict=False):
            branch.tokens.append(token_output(self._tokenizer, *target))
        if not chunk.ends_tokens:
            return None
        if is_prompt:
            self._share_prompt(sequence, scheduler, now_s)
        else:
            del self._running[sequence]
            scheduler.finish(sequence)
            self._num_done += 1
        self._queue_branches(scheduler, now_s)
        if self._num_done < len(self._branches):
            return None
        self.is_done = True
        self.drop(scheduler)
        return ScoreOutput([self._scored(branch) for branch in self._branches], self._meter.usage(now_s))

    def _share_prompt(self, sequence: Sequence, scheduler: Scheduler, now_s: float) -> None:
        """Keep the prompt's KV, from which the continuations start."""
        self._prefix = scheduler.hold(sequence, sequence.num_tokens)
        scheduler.finish(sequence)
        self._prompt = None
        self._meter.end_prefill(now_s)
        longer = [branch for branch in self._branches if len(branch.token_ids) > 1]
        self._num_done = len(self._branches) - len(longer)
        self._unqueued = iter(longer)

    def drop(self, scheduler: Scheduler) -> None:
        """Free every sequence's blocks and the shared prompt's."""
        if self._prompt is not None:
            scheduler.finish(self._prompt, is_answered=False)
        for sequence in self._running:
            scheduler.finish(sequence, is_answered=False)
        if self._prefix is not None:
            scheduler.release(self._prefix)

    def _queue_branches(self, scheduler: Scheduler, now_s: float) -> None:
        """Queue enough for a step, as if it arrived now: earlier requests have their turn first."""
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
        """Tokens of the continuations in the scheduler."""
        return sum(len(branch.token_ids) - 1 for branch in self._running.values())

    @property
    def _num_context_tokens(self) -> int:
        """The number of virtual tokens and prompt tokens."""
        return self._lease.num_virtual_tokens + len(self._request.prompt_token_ids)

    def _new_branch_sequence(self, branch: _Branch) -> Sequence:
        sequence = self._sequence(self._request.prompt_token_ids + branch.token_ids[:-1])
        sequence.logits_from = self._num_context_tokens - 1 + len(branch.tokens)
        if len(self._branches) > 1:  # otherwise the rows are those of this sequence, identified by
            sequence.is_bulk = self._is_bulk or self._has_many_rows
        self._running[sequence] = branch
        return sequence

    def _sequence(self, token_ids: tuple[int, ...]) -> Sequence:
        """A sequence that starts from the shared prompt once that is computed."""
        sequence = new_sequence(self.id, self._request, token_ids, 0, self._lease, self._model, self._prefix)
        sequence.is_bulk = self._is_bulk
        return sequence

    def _scored(self, branch: _Branch) -> ScoredContinuation:
        tokens = tuple(branch.tokens[branch.num_given :])
        return ScoredContinuation(sum(token.logprob or 0.0 for token in tokens), tokens)
