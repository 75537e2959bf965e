"""Grammars compiled here and now, without the process that tries them first."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from manyhats.engine.constraint import Constraint
from manyhats.engine.sampling.grammar_library import compiled, make_vocabulary, notation
from manyhats.engine.sampling.matcher import Grammar, Matcher
from manyhats.engine.text.tokenizer import Tokenizer


def grammar_of(
    constraint: Constraint, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]
) -> Grammar:
    num_ids = max(vocab_size, tokenizer.vocab_size)
    vocabulary = make_vocabulary(tokenizer.to_json(), tokenizer.vocab_size, num_ids, eos_token_ids)
    source = notation(constraint)
    return Grammar(
        constraint,
        lambda: compiled(vocabulary, source),
        num_library_ids=vocabulary.vocab_size,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
    )


def allowed_ids(matcher: Matcher, vocab_size: int) -> set[int]:
    """The tokens that may come next."""
    mask = np.empty(matcher.num_words, dtype=np.int32)
    matcher.mask(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size]
    return set(np.flatnonzero(bits).tolist())
