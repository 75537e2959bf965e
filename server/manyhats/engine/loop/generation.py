"""One generation in the engine: from queue to last token."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Seq
from itertools import repeat

import numpy as np

from manyhats.engine.backends.wants import Token
from manyhats.engine.errors import NoTokenAllowedError, StreamUnreadError
from manyhats.engine.loop.backlog import Backlog
from manyhats.engine.loop.job import Answer, Want, token_output
from manyhats.engine.loop.meter import Meter
from manyhats.engine.loop.serving import ServingModel, new_sequence
from manyhats.engine.output import FinishReason, StepOutput, TokenOutput
from manyhats.engine.request import Request
from manyhats.engine.residency.lease import Lease
from manyhats.engine.sampling.matcher import Mask, Matcher
from manyhats.engine.sampling.penalties import NO_EDITS, LogitChanges, changes_logits, depends_on_output
from manyhats.engine.sampling.sampler import SamplingRow, fitted
from manyhats.engine.scheduling.schedule import Chunk
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import SequenceStatus
from manyhats.engine.speculation.drafter import Drafter
from manyhats.engine.text.stopping import StopChecker


class Generation:
    """A ``Job`` that samples one token per step, or several with drafts, and pauses while its reader is too far behind.

    Args:
        job_id: unique.
        request: checked.
        lease: of its adapter.
        model: what requests need to know about it.
        backlog: its reader's; None if it always keeps up.
        matcher: of its constraint; None without one.
    """

    def __init__(
        self,
        job_id: str,
        request: Request,
        lease: Lease,
        model: ServingModel,
        backlog: Backlog | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        self.id = job_id
        self.deadline_s = request.deadline_s
        self.is_done = False
        self._request = request
        self._backlog = backlog
        self._tokenizer = model.tokenizer_of(request)
        self._vocab_size = model.vocab_size_of(lease)
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
        self._has_penalties = depends_on_output(sampling)
        skips = request.response.skip_special_tokens
        self._is_exact = matcher is not None and matcher.constraint.is_exact
        self._detokenizer = self._tokenizer.stream(skip_special_tokens=skips, is_exact=self._is_exact)
        # Stop sequences are searched for in the text with literals, which the answer need not show.
        self._watched = (
            self._tokenizer.stream(skip_special_tokens=False, is_exact=self._is_exact)
            if skips and stopping.stop_sequences
            else None
        )
        self._eos_token_ids = frozenset(i for i in model.eos_of(request) if i < self._vocab_size)
        self._stop = StopChecker(stopping, self._eos_token_ids)
        self._drafter = self._new_drafter(request)
        self._draft_masks: Seq[Mask] = ()  # after each of the drafts
        self._matcher = matcher
        self._sequence.needs_tokens = self._has_penalties or matcher is not None or self._drafter is not None
        self._allowed: Mask | None = None
        self._may_continue = True
        if matcher is not None:
            self._allowed = np.empty(matcher.num_words, dtype=np.int32)
            self._may_continue = matcher.mask(self._allowed)
        self._end_s = None if stopping.time_limit_s is None else request.accepted_s + stopping.time_limit_s
        self._meter = Meter(request.accepted_s, len(prompt), lease.load_s)

    def _new_drafter(self, request: Request) -> Drafter | None:
        max_tokens = request.speculation.num_tokens
        if not max_tokens:
            return None
        ends = self._eos_token_ids | set(request.stopping.stop_token_ids)
        return Drafter(request.prompt_token_ids, self._likeness, ends, max_tokens)

    def _likeness(self, token_id: int) -> int:
        """The same for tokens of one word, whatever its case and the space around it."""
        text = self._tokenizer.piece(token_id)
        return hash(text.strip().casefold() or text)

    def next(self, scheduler: Scheduler, now_s: float) -> StepOutput | None:
        """Queue the prompt, once; end at the time limit, keeping what there is; pause or resume with its reader; draft.

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
        if self._drafter is not None and self._sequence.is_decoding:
            self._draft(self._drafter, scheduler)
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

    def _draft(self, drafter: Drafter, scheduler: Scheduler) -> None:
        """Propose what may come next, as far as the constraint and the answer's length let it."""
        sequence = self._sequence
        room = min(scheduler.num_draftable, sequence.max_num_tokens - sequence.num_tokens - 1)
        drafts = drafter.draft(room)
        if drafts and self._matcher is not None:
            self._draft_masks = self._matcher.masks_after(drafts)
            drafts = drafts[: len(self._draft_masks)]
        scheduler.draft(sequence, drafts)

    def wants(self, chunk: Chunk) -> Want:
        """The tokens after the last one and each draft, and the log-probabilities of the prompt's after the first."""
        sequence = chunk.sequence
        self._meter.start(sequence.num_cached_tokens)
        first = chunk.start + chunk.num_rows - chunk.num_logit_rows + 1
        scored = sequence.token_ids[first : min(chunk.end + 1, sequence.num_prompt_tokens)]
        return Want(
            samples=self._sampling_rows(chunk) if chunk.ends_tokens else (),
            target_rows=range(len(scored)),
            target_ids=scored,
            num_top=self._request.response.top_logprobs,
            vocab_size=self._vocab_size,
        )

    def _sampling_rows(self, chunk: Chunk) -> list[SamplingRow]:
        """How the token after the last one is chosen, and those after drafts, as if all drafts before had come."""
        num_generated = chunk.sequence.num_expected_output_tokens
        masks = (self._allowed, *self._draft_masks) if self._matcher is not None else repeat(None)
        return [
            self._sampling_row(num_generated + index, chunk.drafts[:index], mask)
            for index, mask in zip(range(1 + len(chunk.drafts)), masks, strict=False)
        ]

    def _sampling_row(self, num_generated: int, drafts: Seq[int], allowed: Mask | None) -> SamplingRow:
        """The request's parameters, and how its tokens so far and these drafts affect them."""
        response = self._request.response
        edits = NO_EDITS
        if self._changes is not None:
            edits = self._changes.edits_after(drafts) if drafts else self._changes.edits
        return SamplingRow(
            params=self._request.sampling,
            seed=self._seed,
            step=num_generated,
            edits=edits,
            forbid=self._forbidden_ids(num_generated),
            allowed=None if allowed is None else fitted(allowed, self._vocab_size),
            num_logprobs=response.top_logprobs if response.logprobs else None,
        )

    def _forbidden_ids(self, num_generated: int) -> tuple[int, ...]:
        if not self._may_continue:
            return ()
        forbidden = self._stop.forbidden_ids(num_generated)
        if self._matcher is not None and self._request.stopping.ignore_eos:
            forbidden += tuple(self._eos_token_ids)  # as an ordinary token it is part of no language
        return forbidden

    def take(self, chunk: Chunk, answer: Answer, scheduler: Scheduler, now_s: float) -> StepOutput | None:
        """Keep the prompt's log-probabilities, append the chosen tokens to the sequence, and emit what they add.

        The token chosen after a draft counts only if that draft, and all before it, were chosen too.

        Raises:
            NoTokenAllowedError: there was none to choose.
            FieldInvalidError: its constraint is too complex to go on.
        """
        self._prompt_tokens += [token_output(self._tokenizer, *target) for target in answer.targets]
        if not answer.tokens:
            return None
        self._meter.end_prefill(now_s)
        text, reason = "", None
        taken: list[Token] = []
        for token, draft in zip(answer.tokens, (*chunk.drafts, None), strict=False):
            if token.id < 0:
                if not taken:
                    raise NoTokenAllowedError
                break  # the next step will say so, after these have been sent
            taken.append(token)
            more, reason = self._take_token(token.id, len(taken))
            text += more
            if reason is not None or token.id != draft:
                break
        self._append([token.id for token in taken], chunk.drafts, scheduler)
        tokens = tuple(token_output(self._tokenizer, token.id, token.logprob) for token in taken)
        if reason is not None:
            self._finish(scheduler)
        return self._output(text, tokens, reason, now_s)

    def _append(self, token_ids: Seq[int], drafts: Seq[int], scheduler: Scheduler) -> None:
        scheduler.append_tokens(self._sequence, *token_ids)
        if self._drafter is not None:
            self._meter.note_drafts(len(drafts), self._drafter.take(token_ids, drafts))

    def _take_token(self, token_id: int, num_taken: int) -> tuple[str, FinishReason | None]:
        """The text that a token adds, and whether it ends the answer; it is the ``num_taken``-th of this step."""
        sequence = self._sequence
        if self._changes is not None and self._has_penalties:
            self._changes.append(token_id)
        text, reason = self._push_text(token_id, sequence.num_output_tokens + num_taken)
        if reason in (None, FinishReason.LENGTH) and not self._goes_on(token_id):
            reason = FinishReason.EOS
        if reason is None and sequence.num_tokens + num_taken >= sequence.max_num_tokens:
            reason = FinishReason.LENGTH
        is_cut = (
            reason is FinishReason.STOP_SEQUENCE and token_id not in self._request.stopping.stop_token_ids
        )
        if reason is not None and not is_cut:
            text += self._rest()
        return text, reason

    def _goes_on(self, token_id: int) -> bool:
        """Whether anything may follow a token in the language of the constraint."""
        if self._matcher is None or self._allowed is None:
            return True
        if self._may_continue and not self._matcher.advance(token_id):
            raise RuntimeError(f"token {token_id} is not in the language, but was allowed")
        self._may_continue = self._may_continue and self._matcher.mask(self._allowed)
        return self._may_continue

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
        scheduler.finish(self._sequence, is_answered=False)

    def _rest(self) -> str:
        """The text held back: an unfinished stop sequence, an incomplete character unless that is in no language."""
        held = self._stop.flush()
        return held + (self._detokenizer.pending() if self._is_exact else self._detokenizer.flush())

    def _finish(self, scheduler: Scheduler) -> None:
        self.is_done = True
        scheduler.finish(self._sequence)

    def _output(
        self, text: str, tokens: tuple[TokenOutput, ...], reason: FinishReason | None, now_s: float
    ) -> StepOutput:
        usage = self._meter.usage(now_s, self._sequence.num_output_tokens)
        prompt_tokens, self._prompt_tokens = tuple(self._prompt_tokens), []
        output = StepOutput(text, tokens, prompt_tokens, reason, usage, now_s, self._stop.stop)
        if self._backlog is not None:
            self._backlog.put(output)
        return output
