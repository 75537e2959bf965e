"""What is streamed, joined, is the whole decode: for every decoder of the library, and chains of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models

from manyhats.engine.text.decoder_chain import clean_up_spaces, steps_for
from manyhats.engine.text.decoder_steps import REPLACEMENT
from manyhats.engine.text.detokenizer import pieces_for
from manyhats.engine.text.tokenizer import Tokenizer as OurTokenizer

TOKENS = (
    *(
        "",
        " ",
        "  ",
        "▁",
        "▁▁",
        "a",
        "aa",
        "b",
        "ba",
        "a</w>",
        "</w>",
        "##a",
        "##",
        "é",
        "日本",
        "x▁",
        "▁x y ",
    ),
    *(
        ".",
        " .",
        "?",
        " ' ",
        "'",
        " do not",
        " n't",
        "n't",
        " 's",
        "'s",
        ",",
        "|",
        "<pad>",
        "||",
        " '",
        "m",
        " ve",
    ),
    *("<0x61>", "<0xE2>", "<0x82>", "<0xAC>", "<0xEF>", "<0xBF>", "<0xBD>", "<0x+F>", "<0xZZ>", "<0x6", "1>"),
    *("Ġa", "Ã", "©", "â", "Ĥ", "¬", "Ġ", "Ċ"),
)
SPECIAL = ("<s>", "▁<s>")


def tokenizer_with(decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens(["<tool>", "it 's"])
    tokenizer.decoder = decoder
    return tokenizer


IDS = st.lists(st.integers(0, len(TOKENS) + len(SPECIAL) + 4), max_size=24)

PATTERNS = (" ", "▁", "aa", "aba", "</w>", "</w>a", "##", "  ", ". ")
STEPS: dict[str, st.SearchStrategy[Any]] = {
    "Replace": st.builds(
        decoders.Replace, st.sampled_from(PATTERNS), st.sampled_from(["", " ", "▁", "a", "b "])
    ),
    "Regex": st.builds(
        decoders.Replace,
        st.sampled_from([r"a+", r"\s$", r"^▁", "b(?=a)"]).map(Regex),
        st.sampled_from(["", "-"]),
    ),
    "Strip": st.builds(
        decoders.Strip, st.sampled_from([" ", "a", "▁"]), st.integers(0, 3), st.sampled_from([0, 0, 1, 2])
    ),
    "Metaspace": st.builds(
        decoders.Metaspace,
        replacement=st.sampled_from(["▁", "a"]),
        prepend_scheme=st.sampled_from(["always", "first", "never"]),
    ),
    "WordPiece": st.builds(decoders.WordPiece, st.sampled_from(["##", "", "a"]), st.booleans()),
    "BPEDecoder": st.builds(decoders.BPEDecoder, st.sampled_from(["</w>", "a"])),
    "CTC": st.builds(
        decoders.CTC, st.sampled_from(["<pad>", "a"]), st.sampled_from(["|", " "]), st.booleans()
    ),
    "ByteFallback": st.builds(decoders.ByteFallback),
    "ByteLevel": st.builds(decoders.ByteLevel),
    "Fuse": st.builds(decoders.Fuse),
}
CHAINS = st.lists(st.one_of(*STEPS.values()), min_size=1, max_size=5).map(decoders.Sequence)


def streamed(tokenizer: Tokenizer, ids: Sequence[int], **options: bool) -> tuple[str, str]:
    """What the tokens give out, and what the end does."""
    stream = pieces_for(tokenizer, **options).stream()
    pushed = "".join([stream.push(token_id) for token_id in ids])
    rest = stream.flush()
    assert stream.flush() == ""
    return pushed, rest


def decoded(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> str | None:
    """The library's own; None where it fails, which it does if more is to be stripped than there is."""
    try:
        return tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return None


def assert_streams_the_whole(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    for skips in (True, False):
        whole = decoded(tokenizer, ids, skip_special_tokens=skips)
        if whole is not None:
            assert "".join(streamed(tokenizer, ids, skip_special_tokens=skips)) == whole
            cleaned = streamed(tokenizer, ids, skip_special_tokens=skips, cleans_up_spaces=True)
            assert "".join(cleaned) == clean_up_spaces(whole)


def assert_pending_ends_the_text_so_far(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    stream, pushed = pieces_for(tokenizer).stream(), ""
    for index, token_id in enumerate(ids):
        pushed += stream.push(token_id)
        whole = decoded(tokenizer, ids[: index + 1], skip_special_tokens=True)
        if whole is not None:
            pending = stream.pending()
            assert pending == stream.pending()
            assert pushed + pending == whole or (pending == "" and REPLACEMENT in whole)
    whole = decoded(tokenizer, ids, skip_special_tokens=True)
    assert whole is None or whole == pushed + stream.flush()


@pytest.mark.parametrize("name", sorted(STEPS))
def test_each_decoders_stream_joined_is_the_whole_decoded(name: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(decoder=STEPS[name], ids=IDS)
    def check(decoder: Any, ids: list[int]) -> None:
        assert_streams_the_whole(tokenizer_with(decoder), ids)
        assert_pending_ends_the_text_so_far(tokenizer_with(decoder), ids)

    check()


@settings(max_examples=150, deadline=None)
@given(decoder=CHAINS, ids=IDS)
def test_a_chains_stream_joined_is_the_whole_decoded(decoder: Any, ids: list[int]) -> None:
    assert_streams_the_whole(tokenizer_with(decoder), ids)
    assert_pending_ends_the_text_so_far(tokenizer_with(decoder), ids)


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(0, 3), stop=st.integers(0, 3), parts=st.lists(st.text(" ab", max_size=4), max_size=6)
)
@example(0, 1, [])
@example(1, 1, [" "])
@example(2, 2, ["  ", " "])
def test_stripping_parts_strips_the_whole(start: int, stop: int, parts: list[str]) -> None:
    strip = {"type": "Strip", "content": " ", "start": start, "stop": stop}
    make = steps_for([{"type": "Fuse"}, strip])
    assert make is not None
    fuse, step = make()
    text = "".join(out for part in parts for each in fuse.push(part) for out in step.push(each))
    whole = "".join(parts)
    first = min(start, len(whole) - len(whole.lstrip()))
    last = len(whole) - min(stop, len(whole) - len(whole.rstrip()))
    assert text + "".join(step.end()) == whole[first:last]


def test_a_tokenizer_without_decoder_joins_by_spaces_as_it_goes() -> None:
    tokenizer = tokenizer_with(None)
    ids = [TOKENS.index(token) for token in ("a", "b", "", "é")]
    assert streamed(tokenizer, ids) == ("a b  é", "")
    assert tokenizer.decode(ids) == "a b  é"


@settings(max_examples=100, deadline=None)
@given(ids=IDS)
def test_a_tokenizer_without_decoder_streams_the_whole(ids: list[int]) -> None:
    assert_streams_the_whole(tokenizer_with(None), ids)


SENTENCE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


@pytest.mark.parametrize(
    ("decoder", "tokens", "pushed", "rest"),
    [
        (decoders.Metaspace(), ["▁x y ", "▁", "a"], ["x y ", " ", "a"], ""),
        (decoders.WordPiece("##", True), ["a", "##a", "."], ["a", "a", "."], ""),
        (decoders.BPEDecoder("</w>"), ["a", "a</w>", "b"], ["", "a", "a "], "b"),
        (decoders.CTC("<pad>", "|", False), ["a", "a", "<pad>", "a", "|"], ["a", "", "", "a", "|"], ""),
        (decoders.Sequence([*SENTENCE, decoders.Fuse()]), ["▁", "▁x y ", "<0x61>"], ["", " x y ", ""], "a"),
        (
            decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
            ["a", " ", "b"],
            ["a", "", " b"],
            "",
        ),
        (
            decoders.Sequence([decoders.Fuse(), decoders.Replace("aba", "x")]),
            ["a", "ba", "aa"],
            ["", "x", "a"],
            "a",
        ),
        # Here any later token may change all: a pattern may span tokens, and the end is part of it.
        (
            decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+$"), "x")]),
            ["b", "aa"],
            ["", ""],
            "bx",
        ),
    ],
)
def test_text_comes_as_soon_as_it_is_certain(
    decoder: Any, tokens: list[str], pushed: list[str], rest: str
) -> None:
    tokenizer = tokenizer_with(decoder)
    stream = pieces_for(tokenizer).stream()
    assert [stream.push(TOKENS.index(token)) for token in tokens] == pushed
    assert stream.flush() == rest


@pytest.mark.parametrize("name", sorted(STEPS))
def test_each_piece_is_text_whatever_the_decoder(name: str) -> None:
    @settings(max_examples=20, deadline=None)
    @given(decoder=STEPS[name])
    def check(decoder: Any) -> None:
        pieces = pieces_for(tokenizer_with(decoder))
        for token_id in range(-1, len(TOKENS) + len(SPECIAL) + 4):
            assert isinstance(pieces.piece(token_id), str)

    check()


def test_a_stream_cleans_up_spaces_where_its_tokenizer_does() -> None:
    words = {
        token: i for i, token in enumerate(["<unk>", "it", "'", "s", "here", ",", ".", "##ly", "n't", "is"])
    }
    backend = Tokenizer(models.WordPiece(words, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = OurTokenizer(backend, special_tokens={}, cleans_up_spaces=True)
    ids = [words[token] for token in ("it", "'", "s", "here", "##ly", ",", "is", "n't", "it", ".")]
    stream = tokenizer.stream()
    pushed = [stream.push(token_id) for token_id in ids]
    assert "".join(pushed) + stream.flush() == tokenizer.decode(ids) == "it's herely, isn't it."
    assert pushed[:2] == ["it", ""]
