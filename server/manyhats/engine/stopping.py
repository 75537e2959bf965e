"""When a generation ends by what it says: EOS, stop tokens, stop sequences, length. Time is not known here."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from manyhats.engine.output import FinishReason
from manyhats.engine.request import StoppingParams


class StopChecker:
    """Watches one generation's tokens and text, and lets text out once no stop sequence can begin in it.

    Text counts character by character: of all stop sequences the one that is complete first ends it, of those
    complete at the same character the longest. So the answer doesn't depend on how tokens split the text. A
    sequence complete before ``min_new_tokens`` ends nothing, and its text is let out.
    """

    def __init__(self, params: StoppingParams, eos_token_ids: AbstractSet[int]) -> None:
        """Watch for ``params``; ``eos_token_ids`` are the model's."""
        self._params = params
        self._eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._held = ""

    def forbidden_ids(self, num_generated: int) -> tuple[int, ...]:
        """Ids that may not come next, after ``num_generated`` tokens: those that would end it too early."""
        if num_generated >= self._params.min_new_tokens:
            return ()
        return tuple(sorted(self._eos_token_ids | self._stop_token_ids))

    def push(self, token_id: int, text_delta: str, num_generated: int) -> tuple[str, FinishReason | None]:
        """Take one token.

        Args:
            token_id: the token.
            text_delta: the characters that became certain with it.
            num_generated: tokens so far, this one included.

        Returns:
            text to let out, without what ended it unless ``include_stop_sequence``; and why it ended, or None.
            When it ended, nothing is held back any more.
        """
        may_stop = num_generated >= self._params.min_new_tokens
        if may_stop and token_id in self._eos_token_ids:
            return self.flush(), FinishReason.EOS
        is_stop_token = may_stop and token_id in self._stop_token_ids
        if is_stop_token and not self._params.include_stop_sequence:
            return self.flush(), FinishReason.STOP_SEQUENCE
        num_held = len(self._held)
        text = self._held + text_delta
        match = self._first_match(text, num_held) if may_stop else None
        if match is not None:
            self._held = ""
            start, end = match
            return text[: end if self._params.include_stop_sequence else start], FinishReason.STOP_SEQUENCE
        if is_stop_token or num_generated >= self._params.max_new_tokens:
            self._held = ""
            return text, FinishReason.STOP_SEQUENCE if is_stop_token else FinishReason.LENGTH
        first_held = self._first_possible_start(text)
        self._held = text[first_held:]
        return text[:first_held], None

    def flush(self) -> str:
        """Let out what is held back, once; for a generation that something else ends."""
        text, self._held = self._held, ""
        return text

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
        """Where the longest end of ``text`` lies that begins a stop sequence; ``len(text)`` if none does."""
        first = len(text)
        for stop in self._params.stop_sequences:
            start = text.find(stop[0], max(0, len(text) + 1 - len(stop)))
            while 0 <= start < first:
                if stop.startswith(text[start:]):
                    first = start
                    break
                start = text.find(stop[0], start + 1)
        return first
