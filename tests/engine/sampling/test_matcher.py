"""Masks against an oracle that knows every word of a language."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator

import numpy as np
import pytest
from llguidance import LLParserLimits
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from manyhats.engine.constraint import Constraint, ConstraintKind
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.sampling import grammar_library
from manyhats.engine.sampling.grammar_library import RefusedError
from manyhats.engine.sampling.matcher import Matcher
from manyhats.engine.text.decoder_steps import bytes_of
from manyhats.engine.text.tokenizer import Tokenizer
from support.harnesses.grammars import allowed_ids, grammar_of

EOS, NUM_SPECIAL, V = 0, 2, 64
# Every byte of the languages, and tokens across the bounds of their lexemes and characters.
BYTES = [bytes([byte]) for byte in sorted(set('abcdx0123"{}[]:,. \n-é'.encode()))]
PAIRS = """
    ab bc cd aa bb ba ca ac dd da 12 23 11 31 "a b" ": {" "} }, ], [1 1] aé éa xa ax 1. -1 bcd abc aab bbc cc db
    -0 [[ ]]
"""
TOKENS = [b"", b"", *BYTES, *map(str.encode, PAIRS.split()), b"\xa9a", b"b\xc3"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    char_of = {bytes_of(char): char for char in byte_level.alphabet()}
    names = ["".join(char_of[bytes([byte])] for byte in token) for token in TOKENS]
    names[:NUM_SPECIAL] = ["<end>", "<other>"]
    backend = Backend(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = byte_level, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:NUM_SPECIAL]])
    return Tokenizer(backend, special_tokens={"eos_token": "<end>"})


def words_of(pattern: str, alphabet: str, max_length: int) -> set[str]:
    lengths = range(max_length + 1)
    texts = ("".join(chars) for length in lengths for chars in itertools.product(alphabet, repeat=length))
    return {text for text in texts if re.fullmatch(pattern, text)}


FINITE: list[tuple[ConstraintKind, str | tuple[str, ...], set[str]]] = [
    ("choice", ("a", "ab", "abc", "é", "bé\n", '"a"'), {"a", "ab", "abc", "é", "bé\n", '"a"'}),
    ("choice", ("a.b", "[a]", "{1}", "-", "x x"), {"a.b", "[a]", "{1}", "-", "x x"}),
    ("regex", "(ab|b){1,3}c?", words_of("(ab|b){1,3}c?", "abc", 7)),
    ("regex", "a?b?c?d?", words_of("a?b?c?d?", "abcd", 4)),
    ("regex", "^(a|é){2}(c|d)|a$", words_of("(a|é){2}(c|d)|a", "aécd", 3)),
    ("regex", "(aa?|ab?){1,2}d{1,2}", words_of("(aa?|ab?){1,2}d{1,2}", "abd", 6)),
    ("regex", "a{0}", {""}),
    ("json_schema", '{"enum": ["ab", 1, 12, "é"]}', {'"ab"', "1", "12", '"é"'}),
    ("json_schema", '{"type": "integer", "minimum": -1, "maximum": 3}', {"-1", "-0", "0", "1", "2", "3"}),
    (
        "json_schema",
        '{"type": "array", "maxItems": 0}',
        {"[]", "[ ]", *("[\n" + k * " " + "]" for k in range(33))},
    ),
    ("grammar", 'start: a b?\na: "a" | "ab"\nb: "b" | /[cd]/', {"a", "ab", "abb", "ac", "ad", "abc", "abd"}),
]


def reached(matcher: Matcher, text: bytes) -> Iterator[tuple[bytes, set[int], bool]]:
    """Every text that the masks lead to from this one on, with its mask; each on a copy."""
    allowed = allowed_ids(matcher, V)
    yield text, allowed, matcher.may_end
    for token_id in sorted(allowed - {EOS}):
        longer = matcher.copy()
        assert longer.advance(token_id)
        yield from reached(longer, text + TOKENS[token_id])


@pytest.mark.parametrize(("kind", "source", "words"), FINITE)
def test_a_token_is_allowed_exactly_if_a_word_begins_so(
    tokenizer: Tokenizer, kind: ConstraintKind, source: str | tuple[str, ...], words: set[str]
) -> None:
    assert len(TOKENS) == V
    prefixes = {word.encode()[:end] for word in words for end in range(len(word.encode()) + 1)}
    matcher = grammar_of(Constraint(kind, source), tokenizer, V, {EOS}).matcher()
    ended = set()
    for text, allowed, may_end in reached(matcher, b""):
        expected = {i for i in range(NUM_SPECIAL, V) if text + TOKENS[i] in prefixes}
        is_word = text.decode(errors="replace") in words
        expected |= {EOS} if is_word else set()
        # Where a schema leaves but one text, the library allows only the tokens that the tokenizer makes of it.
        assert allowed == expected or (kind == "json_schema" and allowed and allowed < expected), text
        assert may_end == is_word
        ended |= {text} if is_word else set()
    assert ended == {word.encode() for word in words}


def test_a_token_that_may_not_come_is_refused_and_changes_nothing(tokenizer: Tokenizer) -> None:
    matcher = grammar_of(Constraint("regex", "ab+c"), tokenizer, V, {EOS}).matcher()
    for token in (b"ab", b"b"):
        before = allowed_ids(matcher, V)
        for token_id in set(range(V)) - before - {EOS}:
            assert not matcher.advance(token_id)
        assert allowed_ids(matcher, V) == before
        assert matcher.advance(TOKENS.index(token))
    assert matcher.advance(TOKENS.index(b"c", NUM_SPECIAL))
    assert allowed_ids(matcher, V) == {EOS}


def test_whitespace_in_json_is_bounded(tokenizer: Tokenizer) -> None:
    matcher = grammar_of(Constraint("json_schema", '{"type": "object"}'), tokenizer, V, {EOS}).matcher()
    assert matcher.advance(TOKENS.index(b"{"))
    space, line = TOKENS.index(b" "), TOKENS.index(b"\n")
    assert {space, line} <= allowed_ids(matcher, V)
    assert matcher.advance(line)
    num_spaces = 0
    while matcher.advance(space):
        num_spaces += 1
    assert num_spaces == 32
    assert not matcher.advance(line)


@pytest.mark.parametrize("vocab_size", [V - 20, V - 1, V, V + 1, V + 31, V + 300])
@pytest.mark.parametrize("eos_token_ids", [{EOS}, {EOS, 1}, set()])
def test_masks_have_the_width_of_the_models_logits(
    tokenizer: Tokenizer, vocab_size: int, eos_token_ids: set[int]
) -> None:
    grammar = grammar_of(Constraint("regex", "a*"), tokenizer, vocab_size, eos_token_ids)
    matcher = grammar.matcher()
    assert matcher.num_words == -(-vocab_size // 32)
    texts = {TOKENS.index(b"a"), TOKENS.index(b"aa")}
    assert allowed_ids(matcher, vocab_size) == {i for i in texts if i < vocab_size} | eos_token_ids
    assert matcher.mask(np.empty(matcher.num_words, np.int32))


def test_answers_do_not_use_up_the_lexer_that_they_share(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = LLParserLimits(max_lexer_states=600, verbose_errors=False)
    monkeypatch.setattr(grammar_library, "_LIMITS", limits)
    grammar = grammar_of(Constraint("regex", "(a|aa|aaa)*(b|bb)*(a|b)*a(a|b){60}"), tokenizer, V, {EOS})
    generator = random.Random(5)
    for _ in range(60):
        matcher = grammar.matcher()
        for _ in range(15):
            assert matcher.advance(generator.choice(sorted(allowed_ids(matcher, V))))
    assert grammar.begun()[1] > 0, "the bound was never reached, so this test shows nothing"


def test_an_answer_that_alone_is_over_a_bound_fails_by_name(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = LLParserLimits(max_lexer_states=100, verbose_errors=False)
    monkeypatch.setattr(grammar_library, "_LIMITS", limits)
    grammar = grammar_of(Constraint("regex", "(a|aa|aaa)*(b|bb)*(a|b)*a(a|b){60}"), tokenizer, V, {EOS})
    matcher, generator = grammar.matcher(), random.Random(5)

    def go_on() -> None:
        for _ in range(100):
            matcher.advance(generator.choice(sorted(allowed_ids(matcher, V))))

    with pytest.raises(
        FieldInvalidError, match=r"regex: cannot be followed after \d+ tokens: .*too many states"
    ):
        go_on()


def test_a_language_that_no_token_begins_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(FieldInvalidError, match="no token of this model can come next"):
        grammar_of(Constraint("regex", "zz"), tokenizer, V, {EOS})


@pytest.mark.parametrize(
    ("kind", "source", "problem"),
    [
        ("json_schema", '{"not": {"type": "null"}}', 'Unimplemented keys: \\["not"\\]'),
        ("json_schema", '{"x-guidance": {"lenient": true}, "uniqueItems": true}', "Unimplemented keys"),
        ("json_schema", '{"x-guidance": {"coerce_one_of": true}, "oneOf": [{}, {"type": "null"}]}', "oneOf"),
        ("json_schema", '{"x-guidance": {"nonsense": true}}', "nonsense"),
        ("json_schema", '{"type": "strng"}', "Invalid type: strng"),
        ("json_schema", '{"$ref": "#/$defs/none"}', "none"),
        ("json_schema", '{"type": "integer", "minimum": 2, "maximum": 1}', "Unsatisfiable"),
        ("regex", "a(", "unclosed group"),
        ("regex", "(?=a)a", "look-around"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("grammar", 'begin: "x"', "start"),
        ("grammar", "start: nothing", "nothing"),
    ],
)
def test_what_cannot_be_done_exactly_is_refused_by_name(
    tokenizer: Tokenizer, kind: ConstraintKind, source: str, problem: str
) -> None:
    with pytest.raises(RefusedError, match=problem) as refused:
        grammar_of(Constraint(kind, source), tokenizer, V, {EOS})
    assert 0 < len(str(refused.value)) <= 501
