"""One generation in the engine: from queue to last token."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

from torch import Tensor

from manyhats.engine.backends.backend import Kernels
from manyhats.engine.backends.logprobs import token_logprobs
from manyhats.engine.errors import StreamUnreadError
from manyhats.engine.loop.backlog import Backlog
from manyhats.engine.loop.jobs import Output, SampledToken, token_output
from manyhats.engine.loop.serving import ServingModel, Start, new_sequence
from manyhats.engine.output import FinishReason, StepOutput, TokenOutput, Usage
from manyhats.engine.request import Request
from manyhats.engine.sampling.penalties import LogitChanges, changes_logits
from manyhats.engine.sampling.sampler import SamplingRow
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence
from manyhats.engine.text.stopping import StopChecker


class Generation:
    """A ``Job`` that samples one token a step, and pauses while its reader is too far behind.

    Args:
        job_id: unique.
        request: checked.
        start: where its adapter lets it begin.
        model: facts of it.
        backlog: of its reader; None for one that always keeps up.
    """

    def __init__(
        self, job_id: str, request: Request, start: Start, model: ServingModel, backlog: Backlog | None = None
    ) -> None:
        self.id = job_id
        self.deadline_s = request.deadline_s
        self.is_done = False
        self.samples = True
        self._request = request
        self._backlog = backlog
        self._tokenizer = model.tokenizer_of(request)
        self._seed = secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed
        stopping = request.stopping
        prompt = request.prompt_token_ids
        self._sequence = new_sequence(job_id, request, prompt, stopping.max_new_tokens, start, model)
        self._prompt_tokens: list[TokenOutput] = []
        if request.response.prompt_logprobs:
            self._sequence.logits_from = start.num_virtual_tokens
            self._prompt_tokens.append(token_output(self._tokenizer, prompt[0], None))
        sampling = request.sampling
        self._changes = LogitChanges(sampling, prompt) if changes_logits(sampling) else None
        skips = request.response.skip_special_tokens
        self._detokenizer = self._tokenizer.stream(skip_special_tokens=skips)
        # Stop sequences are looked for in the text with literals, which the answer need not show.
        self._watched = (
            self._tokenizer.stream(skip_special_tokens=False) if skips and stopping.stop_sequences else None
        )
        self._stop = StopChecker(stopping, model.eos_of(request))
        self._end_s = None if stopping.time_limit_s is None else request.accepted_s + stopping.time_limit_s
        self._usage = Usage(prompt_tokens=len(prompt), adapter_load_s=start.adapter_load_s)
        self._started_s: float | None = None
        self._first_token_s: float | None = None

    def start(self, scheduler: Scheduler) -> None:
        """Queues the prompt."""
        scheduler.add(self._sequence)

    def tick(self, scheduler: Scheduler, now_s: float) -> Output | None:
        """Ends by the time limit, with what there is; else pauses or goes on, as far as its reader is.

        Raises:
            StreamUnreadError: its reader has taken nothing for too long.
        """
        if self._end_s is not None and now_s >= self._end_s:
            self._finish(scheduler)
            return self._output(self._rest(), (), FinishReason.TIME_LIMIT, now_s)
        if self._backlog is not None:
            self._keep_pace(self._backlog, scheduler, now_s)
        return None

    def _keep_pace(self, backlog: Backlog, scheduler: Scheduler, now_s: float) -> None:
        if not backlog.is_awaited:
            if backlog.is_full:
                backlog.wait()
                scheduler.pause(self._sequence)
        elif backlog.has_room:
            backlog.is_awaited = False
            scheduler.resume(self._sequence)
        elif backlog.is_given_up(now_s):
            raise StreamUnreadError(backlog.limit_s)

    def begin(self, sequence: Sequence, now_s: float) -> None:
        """Notes when the request left the queue."""
        if self._started_s is None:
            self._started_s = now_s
            self._usage = replace(
                self._usage,
                queue_s=now_s - self._request.accepted_s,
                cached_prompt_tokens=sequence.num_cached_tokens,
            )

    def sampling_row(self, sequence: Sequence) -> SamplingRow:
        """The request's parameters, and what its tokens so far make of them."""
        num_generated = sequence.num_output_tokens
        response = self._request.response
        return SamplingRow(
            params=self._request.sampling,
            seed=self._seed,
            step=num_generated,
            changes=self._changes,
            forbid=self._stop.forbidden_ids(num_generated),
            num_logprobs=response.top_logprobs if response.logprobs else None,
        )

    def score(
        self, sequence: Sequence, first_position: int, logits: Tensor, kernels: Kernels[Any, Any]
    ) -> None:
        """Keeps the log-probabilities of the prompt's tokens after the first."""
        targets = sequence.token_ids[first_position + 1 : sequence.num_prompt_tokens][: logits.shape[0]]
        num_top = self._request.response.top_logprobs
        found = token_logprobs(logits[: len(targets)], targets, num_top, kernels)
        self._prompt_tokens += [
            token_output(self._tokenizer, *each) for each in zip(targets, found, strict=True)
        ]

    def commit(
        self, sequence: Sequence, sampled: SampledToken | None, scheduler: Scheduler, now_s: float
    ) -> Output | None:
        """Takes the sampled token into the sequence and says what it adds to the answer."""
        if sampled is None:
            return None
        scheduler.append_token(sequence, sampled.id)
        if self._changes is not None:
            self._changes.append(sampled.id)
        if self._first_token_s is None:
            self._first_token_s = now_s
        text, reason = self._push_text(sampled.id, sequence.num_output_tokens)
        if reason is None and sequence.num_tokens >= sequence.max_num_tokens:
            reason = FinishReason.LENGTH
        is_cut = (
            reason is FinishReason.STOP_SEQUENCE and sampled.id not in self._request.stopping.stop_token_ids
        )
        if reason is not None and not is_cut:
            text += self._rest()
        tokens = (token_output(self._tokenizer, sampled.id, sampled.logprob),)
        if reason is not None:
            self._finish(scheduler)
        return self._output(text, tokens, reason, now_s)

    def _push_text(self, token_id: int, num_generated: int) -> tuple[str, FinishReason | None]:
        """The text that a token adds, and whether it ends the answer."""
        if self._stop.leaves_out(token_id, num_generated):
            return self._stop.push(token_id, "", num_generated)
        shown = self._detokenizer.push(token_id)
        watched = shown if self._watched is None else self._watched.push(token_id)
        if not self._request.stopping.stop_sequences:
            return self._stop.push(token_id, watched, num_generated, shown)
        # A stop sequence counts as soon as the text so far has it, even where a later token might have changed that.
        shown_pending = self._detokenizer.pending()
        pending = shown_pending if self._watched is None else self._watched.pending()
        return self._stop.push(
            token_id, watched, num_generated, shown, pending=pending, shown_pending=shown_pending
        )

    def abort(self, scheduler: Scheduler) -> None:
        """Frees the sequence's blocks."""
        scheduler.finish(self._sequence)

    def _rest(self) -> str:
        """What was held back: a stop sequence that did not come, a character that stayed incomplete."""
        return self._stop.flush() + self._detokenizer.flush()

    def _finish(self, scheduler: Scheduler) -> None:
        self.is_done = True
        scheduler.finish(self._sequence)

    def _output(
        self, text: str, tokens: tuple[TokenOutput, ...], reason: FinishReason | None, now_s: float
    ) -> StepOutput:
        started = now_s if self._started_s is None else self._started_s
        first = now_s if self._first_token_s is None else self._first_token_s
        self._usage = replace(
            self._usage,
            generated_tokens=self._sequence.num_output_tokens,
            prefill_s=first - started,
            decode_s=now_s - first,
        )
        prompt_tokens, self._prompt_tokens = tuple(self._prompt_tokens), []
        output = StepOutput(text, tokens, prompt_tokens, reason, self._usage, now_s)
        if self._backlog is not None:
            self._backlog.put(output)
        return output
