"""Token ids to text, one at a time, without ever giving out half a character.

The text of a sequence is what the tokenizer's own decoder makes of all its ids. A detokenizer gives out, at
each token, the characters that no later token can change, so that its pieces joined are that text exactly:

- byte-level decoders (GPT-2, Llama 3, Qwen, SmolLM2) read the tokens as bytes of UTF-8, so a character is
  certain once its last byte is there;
- SentencePiece decoders (Llama 2, Mistral) keep characters whole, but a run of byte tokens is one character
  string or, if any of it is not UTF-8, one replacement character for each byte: it is certain at its end;
- for any other decoder the whole sequence is decoded anew at each token.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """The text of one sequence as it grows."""

    def push(self, token_id: int) -> str:
        """The characters that are certain now and were not before; "" while a character is incomplete."""

    def flush(self) -> str:
        """What is left at the end of the sequence; incomplete bytes become U+FFFD."""


class Pieces(Protocol):
    """What the tokens of one vocabulary are as text; safe to use from several threads."""

    def piece(self, token_id: int) -> str:
        """The text of one token by itself; incomplete bytes become U+FFFD, special tokens their literal."""

    def stream(self) -> Detokenizer:
        """A detokenizer at the beginning of a sequence."""


def pieces_for(backend: Backend, *, skip_special_tokens: bool = True) -> Pieces:
    """The pieces of a tokenizer, by the kind of decoder it has.

    Its streams leave special tokens out, or have their literals with ``skip_special_tokens`` off.
    """
    decoder = backend.decoder
    description: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {}
    while description.get("type") == "Sequence" and len(description["decoders"]) == 1:
        description = description["decoders"][0]
    if description.get("type") == "ByteLevel":
        return BytePieces(backend, skip_special_tokens=skip_special_tokens)
    strip = _sentencepiece_strip(description)
    if strip is not None:
        return SentencePieces(backend, strip, skip_special_tokens=skip_special_tokens)
    return WholePieces(backend, skip_special_tokens=skip_special_tokens)


def _sentencepiece_strip(description: dict[str, Any]) -> int | None:
    """How many leading spaces a SentencePiece decoder strips from a text; None if it is another decoder."""
    if description.get("type") != "Sequence":
        return None
    replace = {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "}
    if description["decoders"][:3] != [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]:
        return None
    match description["decoders"][3:]:
        case []:
            return 0
        case [{"type": "Strip", "content": " ", "start": int(start), "stop": 0}]:
            return start
        case _:
            return None


def clean_up_spaces(text: str) -> str:
    """A text without the spaces that tokenizers of words leave before punctuation and English contractions.

    Source: ``clean_up_tokenization`` of transformers.
    """
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text


class _Vocabulary:
    """Token strings by id; the special ones apart, where they are skipped."""

    def __init__(self, backend: Backend, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._special = _skipped_tokens(backend) if skip_special_tokens else {}

    def special(self, token_id: int) -> str | None:
        """The literal of a special token that is skipped; None for any other."""
        return self._special.get(token_id)

    def token(self, token_id: int) -> str:
        """The string of a token as the vocabulary has it; "" for skipped and unknown ones."""
        if token_id in self._special or token_id < 0:
            return ""
        return self._backend.id_to_token(token_id) or ""


def _skipped_tokens(backend: Backend) -> dict[int, str]:
    """Id → literal of the tokens that decoding skips.

    Their flags do not say it: once special, a token is skipped even if it is added anew as an ordinary one.
    """
    added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
    decoder = backend.decoder
    backend.decoder = decoders.Fuse()  # gives literals as they are
    try:
        return {token_id: literal for token_id, literal in added.items() if not backend.decode([token_id])}
    finally:
        backend.decoder = decoder


def byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level vocabularies: printable Latin-1 is itself, the rest U+0100 and on.

    Source: Radford et al. 2019, GPT-2's ``bytes_to_unicode``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class BytePieces:
    """Tokens of a byte-level vocabulary."""

    def __init__(self, backend: Backend, *, skip_special_tokens: bool = True) -> None:
        self._vocabulary = _Vocabulary(backend, skip_special_tokens)
        self._alphabet = byte_alphabet()
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The UTF-8 bytes, maybe of part of a character, of a token; none for a skipped one."""
        known = self._known.get(token_id)
        if known is None:
            token = self._vocabulary.token(token_id)
            try:
                known = bytes(self._alphabet[character] for character in token)
            except KeyError:  # an added token, written as it is
                known = token.encode()
            self._known[token_id] = known
        return known

    def piece(self, token_id: int) -> str:
        """See ``Pieces``."""
        special = self._vocabulary.special(token_id)
        return self.bytes_of(token_id).decode(errors="replace") if special is None else special

    def stream(self) -> Detokenizer:
        """See ``Pieces``."""
        return _ByteStream(self)


class _ByteStream:
    def __init__(self, pieces: BytePieces) -> None:
        self._bytes_of = pieces.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class SentencePieces:
    """Tokens of a SentencePiece vocabulary with byte fallback.

    Args:
        backend: the tokenizer.
        strip: how many spaces are taken from the beginning of a text, if they are there.
        skip_special_tokens: whether streams leave special tokens out.
    """

    def __init__(self, backend: Backend, strip: int, *, skip_special_tokens: bool = True) -> None:
        self._vocabulary = _Vocabulary(backend, skip_special_tokens)
        self.strip = strip
        self._known: dict[int, str | int] = {}

    def text_or_byte(self, token_id: int) -> str | int:
        """The text of a token, "" for a skipped one; or the byte that a byte token stands for."""
        known = self._known.get(token_id)
        if known is None:
            token = self._vocabulary.token(token_id)
            byte = _BYTE_TOKEN.fullmatch(token)
            known = int(byte[1], 16) if byte else token.replace(_SPACE_MARK, " ")
            self._known[token_id] = known
        return known

    def piece(self, token_id: int) -> str:
        """See ``Pieces``; a leading space is kept."""
        special = self._vocabulary.special(token_id)
        if special is not None:
            return special
        text = self.text_or_byte(token_id)
        return text if isinstance(text, str) else bytes([text]).decode(errors="replace")

    def stream(self) -> Detokenizer:
        """See ``Pieces``."""
        return _SentenceStream(self)


class _SentenceStream:
    def __init__(self, pieces: SentencePieces) -> None:
        self._text_or_byte = pieces.text_or_byte
        self._strip = pieces.strip
        self._run = bytearray()

    def push(self, token_id: int) -> str:
        text = self._text_or_byte(token_id)
        if isinstance(text, int):
            self._run.append(text)
            return ""
        # A skipped token has no text, and does not end a run of bytes either.
        return self._stripped(self._end_run() + text) if text else ""

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if not text.startswith(" "):
                self._strip = 0
                break
            self._strip -= 1
            text = text[1:]
        return text


class WholePieces:
    """Tokens of a vocabulary whose decoder is known only as a whole."""

    def __init__(self, backend: Backend, *, skip_special_tokens: bool = True) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens

    def piece(self, token_id: int) -> str:
        """See ``Pieces``."""
        return self._backend.decode([token_id], skip_special_tokens=False) if token_id >= 0 else ""

    def stream(self) -> Detokenizer:
        """See ``Pieces``."""
        return _WholeStream(self._backend, self._skip_special_tokens)


class _WholeStream:
    def __init__(self, backend: Backend, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._emitted = ""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decoded()
        return "" if text.endswith(REPLACEMENT) else self._emit(text)

    def flush(self) -> str:
        return self._emit(self._decoded())

    def _decoded(self) -> str:
        return self._backend.decode(self._ids, skip_special_tokens=self._skip_special_tokens)

    def _emit(self, text: str) -> str:
        if not text.startswith(self._emitted):
            return ""
        delta = text[len(self._emitted) :]
        self._emitted = text
        return delta
