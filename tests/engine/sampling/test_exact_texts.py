"""The text of an answer is in its language, whatever the tokenizer otherwise does to spaces."""

from __future__ import annotations

import random
import re

import pytest

from manyhats.engine.constraint import Constraint
from manyhats.engine.sampling.matcher import Matcher
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.spaced_tokenizers import KINDS, SPECIALS, spaced_tokenizer
from support.factories.tiny_models import SPECIAL_TOKENS, tiny_tokenizer
from support.harnesses.grammars import allowed_ids, grammar_of

# With spaces where tokenizers lose them: at the beginning, and before punctuation.
PATTERN = " ?[a-z]{1,3}( [a-z]{1,9})? ?[.,]"
EOS = 2


def random_text(tokenizer: Tokenizer, matcher: Matcher, generator: random.Random) -> str:
    stream, text = tokenizer.stream(is_exact=True), ""
    while (token_id := generator.choice(sorted(allowed_ids(matcher, tokenizer.vocab_size)))) != EOS:
        assert matcher.advance(token_id)
        text += stream.push(token_id)
    return text + stream.flush()


def tokenizers() -> dict[str, Tokenizer]:
    special = {"eos_token": SPECIALS[EOS]}
    spaced = {kind: Tokenizer(spaced_tokenizer(kind), special_tokens=special) for kind in KINDS}
    return {
        **spaced,
        "cleaned": Tokenizer(spaced_tokenizer(KINDS[0]), special_tokens=special, cleans_up_spaces=True),
        "byte-level, cleaned": Tokenizer(tiny_tokenizer(), special_tokens={}, cleans_up_spaces=True),
    }


@pytest.mark.parametrize("kind", [*KINDS, "cleaned", "byte-level, cleaned"])
def test_texts_are_in_the_language(kind: str) -> None:
    tokenizer = tokenizers()[kind]
    grammar = grammar_of(Constraint("regex", PATTERN), tokenizer, tokenizer.vocab_size, {EOS})
    generator = random.Random(1)
    texts = [random_text(tokenizer, grammar.matcher(), generator) for _ in range(150)]
    assert all(re.fullmatch(PATTERN, text) for text in texts)
    assert any(text.startswith(" ") for text in texts)
    assert any(" ." in text or " ," in text for text in texts)


def test_a_grammar_may_name_special_tokens() -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), special_tokens={})
    name = SPECIAL_TOKENS[1]
    grammar = grammar_of(Constraint("grammar", f'start: "a" {name} "b"'), tokenizer, 320, {EOS})
    matcher = grammar.matcher()
    assert matcher.advance(tokenizer.token_id("a") or 0)
    assert allowed_ids(matcher, 320) == {1}
