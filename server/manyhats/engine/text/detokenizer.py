"""Token ids to text, one at a time, without ever emitting half a character.

The text of a sequence is what the tokenizer's own decoder makes of all its ids. A detokenizer emits, at each token, the
characters that no later token can change, so that its pieces, joined, are exactly that text:

- byte-level decoders (GPT-2, Llama 3, Qwen, SmolLM2) read the tokens as bytes of UTF-8, so a character is
  certain once its last byte is there;
- SentencePiece decoders (Llama 2, Mistral) keep characters whole, but a run of byte tokens is one character
  string or, if any of it is not UTF-8, one replacement character for each byte: it is certain at its end;
- other chains of decoders are worked through step by step, see ``decoder_chain``;
- a decoder in which any token may change all text before it is run at the end, and nothing is certain earlier.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend

from manyhats.engine.text.decoder_chain import clean_up_steps, end_through, push_through, steps_for
from manyhats.engine.text.decoder_steps import REPLACEMENT, Step, byte_of, byte_run, bytes_of
from manyhats.engine.text.tokenizer_files import single_steps
from manyhats.engine.text.vocabulary import Vocabulary, decoded, text_of

_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"


class Detokenizer(Protocol):
    """The text of one sequence as it grows."""

    def push(self, token_id: int) -> str:
        """The characters that are certain now and were not before; "" while a character is incomplete."""

    def pending(self) -> str:
        """What ``flush`` would return now, except incomplete characters; later tokens may change it."""

    def flush(self) -> str:
        """What remains at the end of the sequence; incomplete bytes become U+FFFD."""


class Pieces(Protocol):
    """The text of one vocabulary's tokens; thread-safe."""

    def piece(self, token_id: int) -> str:
        """The text of one token on its own; incomplete bytes become U+FFFD, special tokens their literal."""

    def stream(self) -> Detokenizer:
        """A detokenizer at the beginning of a sequence."""


def pieces_for(
    backend: Backend, *, skip_special_tokens: bool = True, cleans_up_spaces: bool = False
) -> Pieces:
    """The ``Pieces`` for a tokenizer, by the kind of its decoder.

    Args:
        backend: the tokenizer.
        skip_special_tokens: whether streams leave special tokens out, or contain their literals.
        cleans_up_spaces: whether texts are as ``clean_up_spaces`` leaves them.
    """
    pieces = _pieces(backend, skip_special_tokens)
    return CleanedPieces(pieces) if cleans_up_spaces else pieces


def exact_stream(pieces: Pieces) -> Detokenizer:
    """A detokenizer that keeps spaces that texts otherwise lose: before punctuation, or at their beginning."""
    if isinstance(pieces, CleanedPieces):
        pieces = pieces.uncleaned
    return _SentenceStream(pieces, strip=0) if isinstance(pieces, SentencePieces) else pieces.stream()


def _pieces(backend: Backend, skip_special_tokens: bool) -> Pieces:
    chain = single_steps(backend.decoder)
    if [each["type"] for each in chain] == ["ByteLevel"]:
        return BytePieces(backend, skip_special_tokens=skip_special_tokens)
    strip = _sentencepiece_strip(chain)
    if strip is not None:
        return SentencePieces(backend, strip, skip_special_tokens=skip_special_tokens)
    steps = steps_for(chain)
    if steps is not None:
        return ChainPieces(backend, steps, skip_special_tokens=skip_special_tokens)
    return WholePieces(backend, skip_special_tokens=skip_special_tokens)


def _sentencepiece_strip(chain: Sequence[Mapping[str, Any]]) -> int | None:
    """How many leading spaces a SentencePiece decoder strips from a text; None if it is another decoder."""
    replace = {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "}
    if chain[:3] != [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]:
        return None
    match chain[3:]:
        case []:
            return 0
        case [{"type": "Strip", "content": " ", "start": int(start), "stop": 0}]:
            return start
        case _:
            return None


class BytePieces:
    """Tokens of a byte-level vocabulary."""

    def __init__(self, backend: Backend, *, skip_special_tokens: bool = True) -> None:
        self._vocabulary = Vocabulary(backend, skip_special_tokens)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """A token's UTF-8 bytes, possibly of part of a character; none for a skipped one."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = bytes_of(self._vocabulary.token(token_id) or "")
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

    def pending(self) -> str:
        return ""  # only incomplete characters

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class SentencePieces:
    """Tokens of a SentencePiece vocabulary with byte fallback.

    Args:
        backend: the tokenizer.
        strip: up to how many spaces are removed from the beginning of a text.
        skip_special_tokens: whether streams leave special tokens out.
    """

    def __init__(self, backend: Backend, strip: int, *, skip_special_tokens: bool = True) -> None:
        self._vocabulary = Vocabulary(backend, skip_special_tokens)
        self.strip = strip
        self._known: dict[int, str | int | None] = {}

    def text_or_byte(self, token_id: int) -> str | int | None:
        """The text of a token, None for a skipped one; or the byte that a byte token stands for."""
        try:
            return self._known[token_id]
        except KeyError:
            token = self._vocabulary.token(token_id)
        # A token becomes text before it is tried as a byte.
        text = None if token is None else token.replace(_SPACE_MARK, " ")
        byte = None if text is None else byte_of(text)
        known = self._known[token_id] = text if byte is None else byte
        return known

    def piece(self, token_id: int) -> str:
        """See ``Pieces``; a leading space is kept."""
        special = self._vocabulary.special(token_id)
        if special is not None:
            return special
        text = self.text_or_byte(token_id)
        return bytes([text]).decode(errors="replace") if isinstance(text, int) else text or ""

    def stream(self) -> Detokenizer:
        """See ``Pieces``."""
        return _SentenceStream(self, self.strip)


class _SentenceStream:
    def __init__(self, pieces: SentencePieces, strip: int) -> None:
        self._text_or_byte = pieces.text_or_byte
        self._strip = strip
        self._run = bytearray()

    def push(self, token_id: int) -> str:
        text = self._text_or_byte(token_id)
        if isinstance(text, int):
            self._run.append(text)
            return ""
        # A skipped token does not end a run of bytes either.
        return "" if text is None else self._stripped(self._end_run() + text)

    def pending(self) -> str:
        strip = self._strip
        text = self._stripped("".join(byte_run(bytes(self._run))))
        self._strip = strip
        return _complete(text)

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        return "".join(byte_run(run))

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if not text.startswith(" "):
                self._strip = 0
                break
            self._strip -= 1
            text = text[1:]
        return text


class ChainPieces:
    """Tokens of a vocabulary whose decoder is a chain of steps."""

    def __init__(
        self, backend: Backend, steps: Callable[[], list[Step]], *, skip_special_tokens: bool = True
    ) -> None:
        self._backend = backend
        self._steps = steps
        self._vocabulary = Vocabulary(backend, skip_special_tokens)

    def piece(self, token_id: int) -> str:
        """See ``Pieces``."""
        return text_of(self._backend, token_id)

    def stream(self) -> Detokenizer:
        """See ``Pieces``."""
        return _ChainStream(self._vocabulary, self._steps())


class _ChainStream:
    def __init__(self, vocabulary: Vocabulary, steps: list[Step]) -> None:
        self._vocabulary = vocabulary
        self._steps = steps

    def push(self, token_id: int) -> str:
        token = self._vocabulary.token(token_id)
        return "" if token is None else push_through(self._steps, token)

    def pending(self) -> str:
        return _complete(end_through([copy(step) for step in self._steps]))

    def flush(self) -> str:
        steps, self._steps = self._steps, []
        return end_through(steps)


class WholePieces:
    """Tokens of a vocabulary whose decoder is known only as a whole: a text is certain only at its end."""

    def __init__(self, backend: Backend, *, skip_special_tokens: bool = True) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens

    def piece(self, token_id: int) -> str:
        """See ``Pieces``."""
        return text_of(self._backend, token_id)

    def stream(self) -> Detokenizer:
        """See ``Pieces``."""
        return _WholeStream(self._backend, self._skip_special_tokens)


class _WholeStream:
    def __init__(self, backend: Backend, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def pending(self) -> str:
        return _complete(decoded(self._backend, self._ids, self._skip_special_tokens)) if self._ids else ""

    def flush(self) -> str:
        ids, self._ids = self._ids, []
        return decoded(self._backend, ids, self._skip_special_tokens) if ids else ""


class CleanedPieces:
    """Tokens of a vocabulary whose texts are as ``clean_up_spaces`` leaves them."""

    def __init__(self, pieces: Pieces) -> None:
        self.uncleaned = pieces

    def piece(self, token_id: int) -> str:
        """See ``Pieces``."""
        return self.uncleaned.piece(token_id)

    def stream(self) -> Detokenizer:
        """See ``Pieces``."""
        return _CleanedStream(self.uncleaned.stream())


class _CleanedStream:
    def __init__(self, stream: Detokenizer) -> None:
        self._stream = stream
        self._steps = clean_up_steps()

    def push(self, token_id: int) -> str:
        return push_through(self._steps, self._stream.push(token_id))

    def pending(self) -> str:
        steps = [copy(step) for step in self._steps]
        return push_through(steps, self._stream.pending()) + end_through(steps)

    def flush(self) -> str:
        text = push_through(self._steps, self._stream.flush())
        return text + end_through(self._steps)


def _complete(text: str) -> str:
    return "" if REPLACEMENT in text else text
