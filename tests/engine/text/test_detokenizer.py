from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from manyhats.engine.text.detokenizer import BytePieces, ChainPieces, SentencePieces, pieces_for
from support.factories.default_model import default_model_directory
from support.factories.tiny_models import SPECIAL_TOKENS, tiny_tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def sentencepiece_tokenizer(*, strip: bool = True) -> Tokenizer:
    """A small vocabulary with Llama 2's kind of decoder: bytes, words and a special token."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁▁", "▁the", "▁cat", "s", "é", "▁€", "<0xZZ>"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True
        )
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    words = {"▁the": 0, "▁cat": 1, "s": 2, "▁": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="s"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """The tiny tokenizer with added tokens that are no byte-level text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool call>", "日本", "é"])
    return tokenizer


BYTES = byte_tokenizer()
SENTENCES = sentencepiece_tokenizer()
UNSTRIPPED = sentencepiece_tokenizer(strip=False)
WORDS = metaspace_tokenizer()


def stream(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token gives out, and what the end does."""
    detokenizer = pieces_for(tokenizer).stream()
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    # Two more than there are: models have vocabularies padded beyond their tokenizer's.
    return st.lists(st.integers(0, tokenizer.get_vocab_size() + 1), max_size=40)


@settings(max_examples=300, deadline=None)
@given(ids_of(BYTES))
def test_byte_level_stream_joined_is_the_whole_decoded(ids: list[int]) -> None:
    assert "".join(stream(BYTES, ids)) == BYTES.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(ids_of(SENTENCES))
@example([259, 260, 261])
@example([3 + 0x41, 3 + 0xFF, 261])
@example([3 + 0xE2, 1, 3 + 0x82, 3 + 0xAC, 1])
def test_sentencepiece_stream_joined_is_the_whole_decoded(ids: list[int]) -> None:
    assert "".join(stream(SENTENCES, ids)) == SENTENCES.decode(ids, skip_special_tokens=True)
    assert "".join(stream(UNSTRIPPED, ids)) == UNSTRIPPED.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(ids_of(WORDS))
def test_other_stream_joined_is_the_whole_decoded(ids: list[int]) -> None:
    assert "".join(stream(WORDS, ids)) == WORDS.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
@example("é")  # of whose bytes this vocabulary lacks one
def test_text_never_comes_in_half_characters(text: str) -> None:
    ids = BYTES.encode(text, add_special_tokens=False).ids
    detokenizer, pushed = pieces_for(BYTES).stream(), ""
    for token_id in ids:
        pushed += detokenizer.push(token_id)
        assert text.startswith(pushed) or pushed == BYTES.decode(ids)[: len(pushed)]
    rest, whole = detokenizer.flush(), BYTES.decode(ids, skip_special_tokens=True)
    assert pushed + rest == whole
    assert rest == "" or whole != text


def test_character_of_four_bytes_comes_with_its_last() -> None:
    ids = tiny_tokenizer().encode("a😀b", add_special_tokens=False).ids
    assert stream(tiny_tokenizer(), ids) == ["a", "", "", "", "😀", "b", ""]


def test_incomplete_bytes_become_replacements_at_the_end_once() -> None:
    detokenizer = pieces_for(BYTES).stream()
    (first, *_) = BYTES.encode("€", add_special_tokens=False).ids
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


def test_special_tokens_give_nothing_and_do_not_break_a_character() -> None:
    first, *rest = BYTES.encode("€", add_special_tokens=False).ids
    assert stream(BYTES, [first, 2, *rest]) == ["", "", "", "€", ""]


def test_run_of_byte_tokens_is_certain_at_its_end() -> None:
    euro = [3 + byte for byte in "€".encode()]
    the = id_of(SENTENCES, "▁the")
    assert stream(SENTENCES, [the, *euro, the]) == ["the", "", "", "", "€ the", ""]
    assert stream(SENTENCES, [the, *euro[:2], the]) == ["the", "", "", 2 * REPLACEMENT + " the", ""]


@pytest.mark.parametrize(
    ("tokenizer", "kind"), [(BYTES, BytePieces), (SENTENCES, SentencePieces), (WORDS, ChainPieces)]
)
def test_decoder_decides_the_kind(tokenizer: Tokenizer, kind: type) -> None:
    assert isinstance(pieces_for(tokenizer), kind)


@pytest.mark.parametrize("tokenizer", [BYTES, SENTENCES, WORDS])
def test_piece_of_any_id_is_text(tokenizer: Tokenizer) -> None:
    pieces = pieces_for(tokenizer)
    for token_id in range(-1, tokenizer.get_vocab_size() + 2):
        assert isinstance(pieces.piece(token_id), str)


def test_piece_keeps_spaces_and_literals_and_marks_half_characters() -> None:
    pieces = pieces_for(BYTES)
    assert pieces.piece(BYTES.encode(" the").ids[0]) == " the"
    assert pieces.piece(2) == SPECIAL_TOKENS[2]
    assert pieces.piece(BYTES.encode("€").ids[0]) == REPLACEMENT
    assert pieces.piece(10**6) == ""
    sentences = pieces_for(SENTENCES)
    assert sentences.piece(id_of(SENTENCES, "▁the")) == " the"
    assert sentences.piece(1) == "<s>"
    assert sentences.piece(3 + 0x41) == "A"
    assert sentences.piece(3 + 0xE2) == REPLACEMENT


@pytest.mark.real_model
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_default_models_stream_joined_is_the_whole_decoded(data: st.DataObject) -> None:
    tokenizer = default_backend()
    ids = data.draw(ids_of(tokenizer))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


_LOADED: list[Tokenizer] = []


def default_backend() -> Tokenizer:
    if not _LOADED:
        _LOADED.append(Tokenizer.from_file(str(default_model_directory() / "tokenizer.json")))
    return _LOADED[0]
