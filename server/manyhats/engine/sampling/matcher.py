"""How far an answer has come in the language of its constraint, and which tokens may come next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import FieldInvalidError

if TYPE_CHECKING:
    from manyhats.engine.sampling.grammar_library import State

Mask = npt.NDArray[np.int32]
"""[⌈V / 32⌉], token ids bit by bit from the lowest, as ``SamplingRow.allowed``."""

# A grammar is compiled anew on the engine's thread only if others do not notice.
_MAX_RENEWAL_S = 0.02


class Grammar:
    """A compiled constraint, in which any number of answers can be. Thread-safe.

    The states of its lexer, which all answers share, make masks cheaper the more answers there have been. Their number
    has a bound; once it is reached, the grammar is compiled anew.

    Args:
        constraint: what it was compiled from.
        compile_state: compiles it; called at once.
        num_library_ids: of the library's vocabulary, at least V.
        vocab_size: V, the model's.
        eos_token_ids: those that end an answer, below V.

    Raises:
        FieldInvalidError: no token may come first.
    """

    def __init__(
        self,
        constraint: Constraint,
        compile_state: Callable[[], State],
        *,
        num_library_ids: int,
        vocab_size: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self.constraint = constraint
        self.num_words = -(-vocab_size // 32)
        self._compile_state = compile_state
        self._num_library_words = -(-num_library_ids // 32)
        self._lock = threading.Lock()
        begin_s = time.thread_time()
        self._first = compile_state()
        self._compile_s = time.thread_time() - begin_s
        self._num_renewals = 0
        is_token = np.arange(self.num_words * 32) < vocab_size
        is_ordinary = is_token.copy()
        is_ordinary[np.array(sorted(eos_token_ids), dtype=np.int64)] = False
        self._ordinary = _packed(is_ordinary)
        self.first_mask = np.empty(self.num_words, dtype=np.int32)
        state = self._first.deep_copy()
        self.fill(state, self.first_mask)
        if state.is_error() or not np.any(self.first_mask & _packed(is_token)):
            raise FieldInvalidError(constraint.kind, _message_of(state))

    def matcher(self) -> Matcher:
        """The matcher of a new answer."""
        return Matcher(self, *self.begun())

    def begun(self) -> tuple[State, int]:
        """A state before any token, and how often the grammar has been renewed by now."""
        with self._lock:
            return self._first.deep_copy(), self._num_renewals

    def renewed(self, num_renewals: int) -> tuple[State, int] | None:
        """``begun``, after a renewal unless there was another since ``num_renewals``; None if it takes too long."""
        with self._lock:
            if num_renewals == self._num_renewals:
                if self._compile_s > _MAX_RENEWAL_S:
                    return None
                self._first = self._compile_state()
                self._num_renewals += 1
        return self.begun()

    def fill(self, state: State, into: Mask) -> None:
        """Write the mask of a state; if that is in error afterwards, the mask means nothing."""
        if self._num_library_words == self.num_words:
            _compute(state, into)
        else:
            scratch = np.empty(self._num_library_words, dtype=np.int32)
            _compute(state, scratch)
            into[:] = scratch[: self.num_words]

    def allows_more(self, mask: Mask) -> bool:
        """Whether a mask allows any token but EOS."""
        return bool(np.any(mask & self._ordinary))


class Matcher:
    """One answer's place in its language. Used by one thread at a time."""

    def __init__(self, grammar: Grammar, state: State, num_renewals: int) -> None:
        self._grammar = grammar
        self._state = state
        self._num_renewals = num_renewals
        self._is_renewed = False
        self._token_ids: list[int] = []

    @property
    def constraint(self) -> Constraint:
        """What it keeps the answer to."""
        return self._grammar.constraint

    @property
    def may_end(self) -> bool:
        """Whether the answer is complete as it is."""
        return self._state.is_accepting()

    @property
    def num_words(self) -> int:
        """Words of a mask."""
        return self._grammar.num_words

    def mask(self, into: Mask) -> bool:
        """Write which tokens may come next: EOS where the answer may end.

        Returns:
            whether any token but EOS may come.

        Raises:
            FieldInvalidError: no token may come, or finding out takes more than the library's bounds allow.
        """
        if not self._token_ids:
            into[:] = self._grammar.first_mask
        else:
            self._grammar.fill(self._state, into)
            while self._state.is_error():
                self._renew()
                self._grammar.fill(self._state, into)
        return self._grammar.allows_more(into)

    def advance(self, token_id: int) -> bool:
        """Take a token; False, and no change, if it may not come next.

        Raises:
            FieldInvalidError: as ``mask``.
        """
        while not self._consume([token_id]):
            if not self._state.is_error():
                return False
            self._renew()
        self._token_ids.append(token_id)
        return True

    def copy(self) -> Matcher:
        """Another answer that has come as far."""
        other = Matcher(self._grammar, self._state.deep_copy(), self._num_renewals)
        other._token_ids, other._is_renewed = list(self._token_ids), self._is_renewed
        return other

    def masks_after(self, token_ids: Iterable[int]) -> list[Mask]:
        """The masks after each of these tokens in turn; this matcher itself stays where it is.

        They end before the first token that may not come, that nothing may follow, or whose mask is too costly.
        """
        ahead = self.copy()
        ahead._is_renewed = True  # guesses are not worth it
        masks: list[Mask] = []
        for token_id in token_ids:
            mask = np.empty(self.num_words, dtype=np.int32)
            try:
                if not ahead.advance(token_id) or not ahead.mask(mask):
                    break
            except FieldInvalidError:  # should the answer get there, it will find out for itself
                break
            masks.append(mask)
        return masks

    def _consume(self, token_ids: list[int]) -> bool:
        try:
            return self._state.try_consume_tokens(token_ids) == len(token_ids)
        except BaseException as error:
            raise _expected(error) from error

    def _renew(self) -> None:
        """Begin anew after an error, once, for it may come from what other answers left in the shared lexer."""
        begun = None if self._is_renewed else self._grammar.renewed(self._num_renewals)
        if begun is not None:
            self._is_renewed = True
            self._state, self._num_renewals = begun
            if self._consume(self._token_ids):
                return
        raise FieldInvalidError(
            self._grammar.constraint.kind,
            f"cannot be followed after {len(self._token_ids)} tokens: {_message_of(self._state)}",
        )


def _compute(state: State, into: Mask) -> None:
    try:
        state.unsafe_compute_mask_ptr(into.ctypes.data, into.nbytes)
    except BaseException as error:
        raise _expected(error) from error


def _expected(error: BaseException) -> BaseException:
    """A panic of the library as an ``Exception``, which it is not: it must end one request, not the thread."""
    return RuntimeError(f"llguidance: {error}") if type(error).__name__ == "PanicException" else error


def _message_of(state: State) -> str:
    from manyhats.engine.sampling.grammar_library import message_of  # most servers never need it

    return message_of(state)


def _packed(bits: npt.NDArray[np.bool_]) -> Mask:
    return np.packbits(bits, bitorder="little").view(np.int32)
