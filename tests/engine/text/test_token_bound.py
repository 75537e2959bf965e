"""The bound is sound: no text has fewer tokens than it says, and where nothing is certain there is none."""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from manyhats.engine.errors import PromptTooLongError
from manyhats.engine.text.token_bound import token_bound
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.default_model import default_model_directory
from support.factories.tiny_models import tiny_tokenizer


def byte_level(normalizer: Any = None, missing: str = "") -> Backend:
    backend = tiny_tokenizer()
    if missing:
        kept = {token: i for token, i in backend.get_vocab().items() if token not in missing}
        backend.model = models.BPE(vocab=kept, merges=[("t", "h"), ("th", "e")])
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def sentencepiece(*, byte_fallback: bool = True, fuse_unk: bool = False) -> Backend:
    """BPE over ``▁the cat``'s characters; others fall back to bytes."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "▁▁", "▁▁▁▁", "th"]
    tokens += ["▁th", "▁the"]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("t", "h"), ("▁", "th"), ("▁th", "e")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=fuse_unk
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def with_added(backend: Backend, **flags: bool) -> Backend:
    backend.add_tokens([AddedToken("the longest literal of all", **flags)])
    return backend


def with_pre_tokenizer(*steps: Any) -> Backend:
    backend = tiny_tokenizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(use_regex=False)])
    return backend


BOUNDED: Mapping[str, Callable[[], Backend]] = {
    "bytes": byte_level,
    "bytes of which controls are missing": lambda: byte_level(missing="ĀāĝÁÿ"),
    "bytes after NFC": lambda: byte_level(normalizers.NFC()),
    "bytes after NFD": lambda: byte_level(normalizers.NFD()),
    "bytes after NFKC": lambda: byte_level(normalizers.NFKC()),
    "bytes after NFKD and NFC": lambda: byte_level(
        normalizers.Sequence([normalizers.NFKD(), normalizers.NFC()])
    ),
    "bytes by a normalizer": lambda: byte_level(normalizers.ByteLevel()),
    "digits apart": lambda: with_pre_tokenizer(pre_tokenizers.Digits(individual_digits=True)),
    "a split": lambda: with_pre_tokenizer(pre_tokenizers.Split(" ", "merged_with_next")),
    "a long added token": lambda: with_added(tiny_tokenizer()),
    "a long added token, normalized": lambda: with_added(sentencepiece(), normalized=True),
    "sentencepiece": sentencepiece,
    "sentencepiece by metaspace": lambda: _metaspace(),
}


def _metaspace() -> Backend:
    backend = sentencepiece()
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return backend


def _unigram() -> Backend:
    return Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False))


def _word_piece() -> Backend:
    return Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


UNBOUNDED: Mapping[str, Callable[[], Backend]] = {
    "an added token that takes white space before it": lambda: with_added(tiny_tokenizer(), lstrip=True),
    "an added token that takes white space after it": lambda: with_added(tiny_tokenizer(), rstrip=True),
    "white space stripped": lambda: byte_level(normalizers.Strip()),
    "accents stripped": lambda: byte_level(
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "runs of blanks replaced": lambda: byte_level(normalizers.Replace("  ", " ")),
    "a pattern replaced": lambda: byte_level(normalizers.Replace(Regex(r"\s+"), "")),
    "lower case": lambda: byte_level(normalizers.Lowercase()),
    "white space dropped": lambda: with_pre_tokenizer(pre_tokenizers.Whitespace()),
    "a removed split": lambda: with_pre_tokenizer(pre_tokenizers.Split(" ", "removed")),
    "a letter without a token": lambda: byte_level(missing="z"),
    "no fallback": lambda: sentencepiece(byte_fallback=False),
    "no fallback, unknown tokens fused": lambda: sentencepiece(byte_fallback=False, fuse_unk=True),
    "unigram": _unigram,
    "wordpiece": _word_piece,
}


@cache
def bounded(kind: str) -> Backend:
    return BOUNDED[kind]()


# Texts that shrink as much as can be: composed, compatible, in runs that are one token, dropped.
texts = st.one_of(
    st.text(max_size=60),
    st.text(max_size=20).map(lambda text: unicodedata.normalize("NFD", text)),
    st.text(alphabet="the \u212b\u1100\u1161\u11a8\U0001d400\uff21\u0344\u2126", max_size=60),
    st.text(alphabet="\0\x01\x1d\x7fthe ▁", max_size=60),
    st.integers(1, 200).map(lambda n: " " * n),
    st.integers(1, 8).map(lambda n: "the longest literal of all" * n),
    st.integers(1, 60).map(lambda n: " the" * n),
)


@pytest.mark.parametrize("kind", BOUNDED)
@settings(max_examples=30, deadline=None)
@given(text=texts)
@example(text="\U0001d400" * 50)
@example(text="\u1100\u1161\u11a8" * 20)
@example(text="<|im_end|>" * 20)
def test_no_text_has_fewer_tokens_than_the_bound_says(kind: str, text: str) -> None:
    backend = bounded(kind)
    bound = token_bound(backend)
    assert bound is not None
    assert bound.min_tokens(text) <= len(backend.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", BOUNDED)
def test_the_bound_grows_with_the_text(kind: str) -> None:
    bound = token_bound(bounded(kind))
    assert bound is not None
    assert bound.min_tokens("the cat " * 10_000) > 100


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_where_text_may_vanish_there_is_no_bound(kind: str) -> None:
    assert token_bound(UNBOUNDED[kind]()) is None


def test_unicode_shortens_no_text_by_more_than_the_bound_allows() -> None:
    forms = [getattr(normalizers, name)() for name in ("NFC", "NFD", "NFKC", "NFKD")]
    for code in (*range(0xD800), *range(0xE000, 0x20000), *range(0x2F800, 0x2FA20)):
        spellings = {chr(code), unicodedata.normalize("NFD", chr(code))}
        for text in spellings:
            shortest = min(len(form.normalize_str(text).encode()) for form in forms)
            assert len(text.encode()) <= 4 * shortest, hex(code)


def test_a_text_that_cannot_fit_is_refused_by_its_length_and_one_that_may_is_counted() -> None:
    tokenizer = Tokenizer.from_directory(default_model_directory())
    with pytest.raises(PromptTooLongError, match="has at least 12946 tokens; the limit is 8191") as caught:
        tokenizer.encode("word" * 2**18, add_special_tokens=True, max_tokens=8191)
    assert caught.value.at_least
    with pytest.raises(PromptTooLongError, match="has 9000 tokens; the limit is 8191"):
        tokenizer.encode(" word" * 9000, add_special_tokens=True, max_tokens=8191)
    assert len(tokenizer.encode(" word" * 8191, add_special_tokens=True, max_tokens=8191)) == 8191
    newline_and_blanks = "\n" + " " * 80  # the longest token
    assert len(tokenizer.encode(newline_and_blanks * 8, add_special_tokens=True, max_tokens=8)) == 8


@settings(max_examples=30, deadline=None)
@given(text=texts, add_special_tokens=st.booleans())
@pytest.mark.parametrize("kind", BOUNDED)
def test_encode_gives_the_libraries_ids(kind: str, text: str, add_special_tokens: bool) -> None:
    backend = bounded(kind)
    theirs = backend.encode(text, add_special_tokens=add_special_tokens).ids
    ours = Tokenizer(backend, special_tokens={})
    assert ours.encode(text, add_special_tokens=add_special_tokens) == theirs
    if theirs:
        limit = len(theirs)
        assert ours.encode(text, add_special_tokens=add_special_tokens, max_tokens=limit) == theirs
        with pytest.raises(PromptTooLongError):
            ours.encode(text, add_special_tokens=add_special_tokens, max_tokens=limit - 1)


def test_other_threads_run_while_a_long_text_is_tokenized() -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), special_tokens={})
    text = "Others go on. " * 20_000
    begun, done = threading.Event(), threading.Event()

    def encode() -> None:
        begun.set()
        tokenizer.encode(text, add_special_tokens=False)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    turns = 0
    begun.wait()
    while not done.is_set():
        turns += 1
    thread.join()
    # With the interpreter lock held, the first turn would come when all is done.
    assert turns > 1000
