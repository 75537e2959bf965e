"""When a generation ends because of its content: EOS, stop tokens, stop sequences, length. Time is not known here."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from manyhats.engine.output import FinishReason
from manyhats.engine.request import StoppingParams


class StopChecker:
    """Watches one generation's tokens and text, and releases text once no stop sequence can begin in it.

    Text counts character by character: of all stop sequences the first to be complete ends it, and of those complete at
    the same character the longest. So the answer doesn't depend on how tokens split the text. A sequence complete
    before ``min_new_tokens`` ends nothing, and its text is released.

    The watched text has the literals of special tokens, as transformers' ``stop_strings`` sees it; the released text
    may lack them.
    """

    def __init__(self, params: StoppingParams, eos_token_ids: AbstractSet[int]) -> None:
        """Watch for ``params``; ``eos_token_ids`` are the model's."""
        self._params = params
        self._eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self.stop: str | int | None = None
        """The stop sequence or stop token that ended it, once one has."""
        self._held = ""
        self._pending = ""
        # What is held back, as (watched, shown): both the same, or a part in which they differ.
        self._spans: list[tuple[str, str]] = []

    def forbidden_ids(self, num_generated: int) -> tuple[int, ...]:
        """Ids that may not come next, after ``num_generated`` tokens: those that would end it too early."""
        if num_generated >= self._params.min_new_tokens:
            return ()
        return tuple(sorted(self._eos_token_ids | self._stop_token_ids))

    def leaves_out(self, token_id: int, num_generated: int) -> bool:
        """Whether a token, the ``num_generated``-th, ends the generation and is not part of its text."""
        if num_generated < self._params.min_new_tokens:
            return False
        is_stop_token = token_id in self._stop_token_ids and not self._params.include_stop_sequence
        return is_stop_token or token_id in self._eos_token_ids

    def push(
        self,
        token_id: int,
        text_delta: str,
        num_generated: int,
        shown_delta: str | None = None,
        *,
        pending: str = "",
        shown_pending: str | None = None,
    ) -> tuple[str, FinishReason | None]:
        """Take one token.

        Args:
            token_id: the token.
            text_delta: the characters that became certain with it, special tokens as their literals.
            num_generated: tokens so far, this one included.
            shown_delta: those of them that the answer shows; None means all.
            pending: the characters that would follow if this were the last token.
            shown_pending: those of them that the answer would show; None means all.

        Returns:
            text to release, without what ended it unless ``include_stop_sequence``; and why it ended, or None. When it
            has ended, nothing is held back any more.
        """
        if self.leaves_out(token_id, num_generated):
            if token_id in self._eos_token_ids:
                return self.flush(), FinishReason.EOS
            self.stop = token_id
            return self.flush(), FinishReason.STOP_SEQUENCE
        may_stop = num_generated >= self._params.min_new_tokens
        is_stop_token = may_stop and token_id in self._stop_token_ids
        if not self._params.stop_sequences:  # then nothing is ever held back
            if is_stop_token:
                self.stop = token_id
            shown = text_delta if shown_delta is None else shown_delta
            return shown, self._reason(num_generated, is_stop_token=is_stop_token)
        held, seen = self._held, self._held + self._pending
        self._pending = "" if is_stop_token else pending
        text = self._held = held + text_delta
        self._spans += _spans(text_delta, text_delta if shown_delta is None else shown_delta)
        whole = text + self._pending
        num_seen = len(seen) if whole.startswith(seen) else len(held)
        match = self._first_match(whole, num_seen) if may_stop else None
        if match is not None:
            start, end = match
            self.stop = whole[start:end]
            if end > len(text):
                self._held = whole
                self._spans += _spans(pending, pending if shown_pending is None else shown_pending)
            shown = self._let_out(end if self._params.include_stop_sequence else start)
            self.flush()
            return shown, FinishReason.STOP_SEQUENCE
        if is_stop_token:
            self.stop = token_id
        reason = self._reason(num_generated, is_stop_token=is_stop_token)
        return self._let_out(self._first_possible_start(text)) if reason is None else self.flush(), reason

    def _reason(self, num_generated: int, *, is_stop_token: bool) -> FinishReason | None:
        """Why it ends with a token that completes no stop sequence; None if it does not."""
        if is_stop_token:
            return FinishReason.STOP_SEQUENCE
        return FinishReason.LENGTH if num_generated >= self._params.max_new_tokens else None

    def flush(self) -> str:
        """Release what is held back, once; for a generation that something else ends."""
        return self._let_out(len(self._held))

    def _let_out(self, end: int) -> str:
        """The shown part of the first ``end`` characters held, which are then no longer held."""
        self._held = self._held[end:]
        shown = ""
        for index, (watched, visible) in enumerate(self._spans):
            if len(watched) > end:
                # A special token that is cut is not shown at all; it has no text in the answer.
                if watched == visible:
                    shown, visible = shown + visible[:end], visible[end:]
                self._spans[: index + 1] = [(watched[end:], visible)]
                return shown
            shown += visible
            end -= len(watched)
        self._spans.clear()
        return shown

    def _first_match(self, text: str, num_seen: int) -> tuple[int, int] | None:
        """(start, end) of the stop sequence that ends first, after the ``num_seen`` characters seen before."""
        found: tuple[int, int] | None = None
        for stop in self._params.stop_sequences:
            start = text.find(stop, max(0, num_seen + 1 - len(stop)))
            end = start + len(stop)
            if start >= 0 and (found is None or (end, start) < (found[1], found[0])):
                found = (start, end)
        return found

    def _first_possible_start(self, text: str) -> int:
        """Where the longest end of ``text`` that begins a stop sequence starts; ``len(text)`` if there is none."""
        first = len(text)
        for stop in self._params.stop_sequences:
            start = text.find(stop[0], max(0, len(text) + 1 - len(stop)))
            while 0 <= start < first:
                if stop.startswith(text[start:]):
                    first = start
                    break
                start = text.find(stop[0], start + 1)
        return first


def _spans(watched: str, shown: str) -> list[tuple[str, str]]:
    """A text and its shown part, split off from the end that they have in common."""
    if watched == shown:
        return [(watched, shown)] if watched else []
    num_common = 0
    for ours, theirs in zip(reversed(watched), reversed(shown), strict=False):
        if ours != theirs:
            break
        num_common += 1
    start = len(watched) - num_common
    different = (watched[:start], shown[: len(shown) - num_common])
    return [different, (watched[start:], watched[start:])] if num_common else [different]
