"""One generation in the engine: from queue to last token."""

from __future__ import annotations

import secrets

from manyhats.engine.backends.wants import Token
from manyhats.engine.errors import NoTokenAllowedError, StreamUnreadError
from manyhats.engine.loop.backlog import Backlog
from manyhats.engine.loop.job import Answer, Want, token_output
from manyhats.engine.loop.meter import Meter
from manyhats.engine.loop.serving import ServingModel, new_sequence
from manyhats.engine.output import FinishReason, StepOutput, TokenOutput
from manyhats.engine.request import Request
from manyhats.engine.residency.lease import Lease
from manyhats.engine.sampling.penalties import LogitChanges, changes_logits
from manyhats.engine.sampling.sampler import SamplingRow
from manyhats.engine.scheduling.schedule import Chunk
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import SequenceStatus
from manyhats.engine.text.stopping import StopChecker


class Generation:
    """A ``Job`` that samples one token per step, and pauses while its reader is too far behind.

    Args:
        job_id: unique.
        request: checked.
        lease: of its adapter.
        model: what requests need to know about it.
        backlog: its reader's; None if it always keeps up.
    """

    def __init__(
        self, job_id: str, request: Request, lease: Lease, model: ServingModel, backlog: Backlog | None = None
    ) -> None:
        self.id = job_id
        self.deadline_s = request.deadline_s
        self.is_done = False
        self._request = request
        self._backlog = backlog
        self._tokenizer = model.tokenizer_of(request)
        self._seed = secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed
        stopping = request.stopping
        prompt = request.prompt_token_ids
        self._sequence = new_sequence(job_id, request, prompt, stopping.max_new_tokens, lease, model)
        self._prompt_tokens: list[TokenOutput] = []
        if request.response.prompt_logprobs:
            self._sequence.logits_from = lease.num_virtual_tokens
            self._prompt_tokens.append(token_output(self._tokenizer, prompt[0], None))
        sampling = request.sampling
        self._changes = LogitChanges(sampling, prompt) if changes_logits(sampling) else None
        skips = request.response.skip_special_tokens
        self._detokenizer = self._tokenizer.stream(skip_special_tokens=skips)
        # Stop sequences are searched for in the text with literals, which the answer need not show.
        self._watched = (
            self._tokenizer.stream(skip_special_tokens=False) if skips and stopping.stop_sequences else None
        )
        self._stop = StopChecker(stopping, model.eos_of(request))
        self._end_s = None if stopping.time_limit_s is None else request.accepted_s + stopping.time_limit_s
        self._meter = Meter(request.accepted_s, len(prompt), lease.load_s)

    def next(self, scheduler: Scheduler, now_s: float) -> StepOutput | None:
        """Queue the prompt, once; end at the time limit, keeping what there is; pause or resume with its reader.

        Raises:
            StreamUnreadError: its reader took nothing for too long.
        """
        if self._sequence.status is SequenceStatus.NEW:
            scheduler.add(self._sequence)
            return None
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

    def wants(self, chunk: Chunk) -> Want:
        """The next token after the last one, and the log-probabilities of the prompt's tokens after the first."""
        sequence = chunk.sequence
        self._meter.start(sequence.num_cached_tokens)
        first = chunk.end - chunk.num_logit_rows + 1
        scored = sequence.token_ids[first : min(chunk.end + 1, sequence.num_prompt_tokens)]
        return Want(
            sample=self._sampling_row(sequence.num_output_tokens) if chunk.ends_tokens else None,
            target_rows=range(len(scored)),
            target_ids=scored,
            num_top=self._request.response.top_logprobs,
        )

    def _sampling_row(self, num_generated: int) -> SamplingRow:
        """The request's parameters, and how its tokens so far affect them."""
        response = self._request.response
        return SamplingRow(
            params=self._request.sampling,
            seed=self._seed,
            step=num_generated,
            changes=self._changes,
            forbid=self._stop.forbidden_ids(num_generated),
            num_logprobs=response.top_logprobs if response.logprobs else None,
        )

    def take(self, chunk: Chunk, answer: Answer, scheduler: Scheduler, now_s: float) -> StepOutput | None:
        """Keep the prompt's log-probabilities, append the chosen token to the sequence, and emit what it adds.

        Raises:
            NoTokenAllowedError: there was none to choose.
        """
        self._prompt_tokens += [token_output(self._tokenizer, *target) for target in answer.targets]
        return None if answer.token is None else self._take_token(answer.token, scheduler, now_s)

    def _take_token(self, token: Token, scheduler: Scheduler, now_s: float) -> StepOutput:
        if token.id < 0:
            raise NoTokenAllowedError
        sequence = self._sequence
        scheduler.append_token(sequence, token.id)
        if self._changes is not None:
            self._changes.append(token.id)
        self._meter.end_prefill(now_s)
        text, reason = self._push_text(token.id, sequence.num_output_tokens)
        if reason is None and sequence.num_tokens >= sequence.max_num_tokens:
            reason = FinishReason.LENGTH
        is_cut = (
            reason is FinishReason.STOP_SEQUENCE and token.id not in self._request.stopping.stop_token_ids
        )
        if reason is not None and not is_cut:
            text += self._rest()
        tokens = (token_output(self._tokenizer, token.id, token.logprob),)
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
        # A stop sequence counts as soon as the text has it, even if a later token might have changed that.
        shown_pending = self._detokenizer.pending()
        pending = shown_pending if self._watched is None else self._watched.pending()
        return self._stop.push(
            token_id, watched, num_generated, shown, pending=pending, shown_pending=shown_pending
        )

    def drop(self, scheduler: Scheduler) -> None:
        """Free the sequence's blocks."""
        scheduler.finish(self._sequence)

    def _rest(self) -> str:
        """The text held back: an unfinished stop sequence, an incomplete character."""
        return self._stop.flush() + self._detokenizer.flush()

    def _finish(self, scheduler: Scheduler) -> None:
        self.is_done = True
        scheduler.finish(self._sequence)

    def _output(
        self, text: str, tokens: tuple[TokenOutput, ...], reason: FinishReason | None, now_s: float
    ) -> StepOutput:
        usage = self._meter.usage(now_s, self._sequence.num_output_tokens)
        prompt_tokens, self._prompt_tokens = tuple(self._prompt_tokens), []
        output = StepOutput(text, tokens, prompt_tokens, reason, usage, now_s)
        if self._backlog is not None:
            self._backlog.put(output)
        return output
