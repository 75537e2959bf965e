"""Constraints become grammars on a background thread, before their requests are queued."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import DrainingError, FieldInvalidError
from manyhats.engine.sampling.matcher import Grammar, Matcher
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.engine.threads.awaiting import outlived
from manyhats.engine.threads.background import background_threads
from manyhats.engine.threads.programs import EndedError, Programs, TooSlowError

if TYPE_CHECKING:
    from manyhats.engine.sampling.grammar_library import Vocabulary

COMPILE_CPU_S = 1.0
"""How much processor time a grammar may take until its first mask."""
MAX_GRAMMARS = 64
# Each takes about 32 MB for 49,152 tokens.
_MAX_VOCABULARIES = 4
# Processor time has its own bound; this is for a machine that is busy, and for reading the tokenizer.
_PATIENCE_S = 20.0
_NUM_COMPARED = 512


@dataclass(frozen=True, slots=True)
class _VocabularyKey:
    """Tasks with the same added tokens and EOS share a vocabulary."""

    added_tokens: str
    eos_token_ids: frozenset[int]


class Grammars:
    """The grammars of the latest constraints; called on the event loop.

    Args:
        num_ids: the width of the logits of a tokenizer's tasks, at least.

    Attributes:
        on_compile: called with the seconds that a compilation took, on its thread.
        num_waiting: requests that wait for their grammar.
    """

    def __init__(self, num_ids: Callable[[Tokenizer], int]) -> None:
        self.on_compile: Callable[[float], None] = lambda seconds: None
        self.num_waiting = 0
        self._num_ids = num_ids
        self._threads = background_threads(1, "grammar")
        self._programs = Programs("manyhats.engine.sampling.grammar_program", 1)
        self._grammars: OrderedDict[tuple[_VocabularyKey, bytes], Future[Grammar]] = OrderedDict()
        self._waiting: Counter[Future[Grammar]] = Counter()
        # On the thread alone.
        self._vocabularies: OrderedDict[_VocabularyKey, Vocabulary] = OrderedDict()

    async def matcher(
        self, constraint: Constraint, tokenizer: Tokenizer, eos_token_ids: frozenset[int]
    ) -> Matcher:
        """The matcher of a new answer; compiles its constraint if it is not among the latest.

        Args:
            constraint: the answer's.
            tokenizer: its request's.
            eos_token_ids: the ids that end it.

        Raises:
            FieldInvalidError: the constraint is refused.
            DrainingError: no more constraints are compiled.
        """
        vocabulary = _VocabularyKey(tokenizer.added_tokens_digest, eos_token_ids)
        key = (vocabulary, constraint.digest)
        if key not in self._grammars:
            self._grammars[key] = self._submitted(constraint, tokenizer, vocabulary)
            while len(self._grammars) > MAX_GRAMMARS:
                self._grammars.popitem(last=False)
        self._grammars.move_to_end(key)
        compiling = self._grammars[key]
        self.num_waiting += 1
        self._waiting[compiling] += 1
        try:
            return (await outlived(asyncio.wrap_future(compiling))).matcher()
        except FieldInvalidError as error:
            raise FieldInvalidError(error.field, error.description) from None  # others await the same one
        except asyncio.CancelledError:
            if compiling.cancelled():
                raise _closed() from None
            raise
        finally:
            self.num_waiting -= 1
            self._waiting[compiling] -= 1
            if not self._waiting[compiling]:
                del self._waiting[compiling]
                compiling.cancel()  # unless it has begun: nobody waits, and others wait behind it
            if self._grammars.get(key) is compiling and _has_failed(compiling):
                del self._grammars[key]

    def close(self) -> None:
        """Compile no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._programs.close()

    def _submitted(
        self, constraint: Constraint, tokenizer: Tokenizer, vocabulary: _VocabularyKey
    ) -> Future[Grammar]:
        try:
            return self._threads.submit(self._compile, constraint, tokenizer, vocabulary)
        except RuntimeError:  # shut down
            raise _closed() from None

    def _compile(self, constraint: Constraint, tokenizer: Tokenizer, key: _VocabularyKey) -> Grammar:
        from manyhats.engine.sampling import grammar_library as library

        begin_s = time.monotonic()
        try:
            vocabulary = self._vocabulary(key, tokenizer)
            notation = library.notation(constraint)
            self._check(constraint, tokenizer, key)
            return Grammar(
                constraint,
                lambda: library.compiled(vocabulary, notation),
                num_library_ids=vocabulary.vocab_size,
                vocab_size=self._num_ids(tokenizer),
                eos_token_ids=key.eos_token_ids,
            )
        except library.RefusedError as error:
            raise FieldInvalidError(constraint.kind, str(error)) from None
        finally:
            self.on_compile(time.monotonic() - begin_s)

    def _vocabulary(self, key: _VocabularyKey, tokenizer: Tokenizer) -> Vocabulary:
        from manyhats.engine.sampling import grammar_library as library

        vocabulary = self._vocabularies.pop(key, None)
        if vocabulary is None:
            vocabulary = library.make_vocabulary(**self._facts(key, tokenizer))
            _check_texts(vocabulary, tokenizer)
        self._vocabularies[key] = vocabulary
        while len(self._vocabularies) > _MAX_VOCABULARIES:
            self._vocabularies.popitem(last=False)
        return vocabulary

    def _facts(self, key: _VocabularyKey, tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "tokenizer": tokenizer.to_json(),
            "num_tokens": tokenizer.vocab_size,
            "num_ids": max(self._num_ids(tokenizer), tokenizer.vocab_size),
            "eos_token_ids": sorted(key.eos_token_ids),
        }

    def _check(self, constraint: Constraint, tokenizer: Tokenizer, key: _VocabularyKey) -> None:
        """Compile a constraint where it can do no harm.

        Raises:
            FieldInvalidError: it is refused, or does harm.
        """
        request = {
            "constraint": constraint,
            "compile_cpu_s": COMPILE_CPU_S,
            "key": (key.added_tokens, sorted(key.eos_token_ids)),
        }
        try:
            answer = self._programs.ask(request, _PATIENCE_S)
            if "needs_vocabulary" in answer:
                answer = self._programs.ask(
                    {**request, "vocabulary": self._facts(key, tokenizer)}, _PATIENCE_S
                )
        except TooSlowError:
            raise FieldInvalidError(
                constraint.kind, f"takes over {COMPILE_CPU_S:g} s of processor time to compile, the limit"
            ) from None
        except EndedError:
            raise FieldInvalidError(
                constraint.kind, "is nested too deeply, or takes too much memory to compile"
            ) from None
        if "error" in answer:
            raise FieldInvalidError(constraint.kind, answer["error"])


def _check_texts(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    """Make sure, by a sample, that the library takes tokens for the text that they become."""
    for token_id in range(0, tokenizer.vocab_size, 1 + tokenizer.vocab_size // _NUM_COMPARED):
        piece, text = tokenizer.piece(token_id), vocabulary.decode_bytes([token_id]).decode(errors="replace")
        if piece not in ("", text) and "\N{REPLACEMENT CHARACTER}" not in piece:  # not parts of characters
            raise RuntimeError(f"token {token_id} is {piece!r}, but {text!r} to the grammar library")


def _has_failed(compiling: Future[Grammar]) -> bool:
    return compiling.done() and (compiling.cancelled() or compiling.exception() is not None)


def _closed() -> DrainingError:
    return DrainingError("the server is shutting down")
