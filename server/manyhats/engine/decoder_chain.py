"""The decoders of the ``tokenizers`` library, one token at a time.

A decoder turns the tokens of a text into other tokens, which are joined at the end; decoders may be chained. Each
step here does what one of them does and gives out, at each token, what no later token can change. Behind a decoder
that makes one token of all (``Fuse``, ``ByteLevel``), steps take parts of that one instead of tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Regex, decoders
from tokenizers.decoders import Decoder

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Rust's reading of two hexadecimal digits, which may begin with a sign.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")

# What transformers' clean_up_tokenization takes the spaces from, in its order.
_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Step(Protocol):
    """One decoder of a chain at work on one text."""

    def push(self, token: str) -> Sequence[str]:
        """What is certain with one more token, or part of the one token, that was not before."""

    def end(self) -> Sequence[str]:
        """What is left when no more come."""


def steps_for(descriptions: Sequence[Mapping[str, Any]]) -> Callable[[], list[Step]] | None:
    """What makes the steps of a chain for one text.

    Args:
        descriptions: of its decoders, as ``tokenizer.json`` has them; none if there is no decoder.

    Returns:
        None if there is one among them whose output is certain at the end alone.
    """
    if not descriptions:
        return lambda: [_Spaced()]
    makers: list[Callable[[], Step]] = []
    is_one_token = False
    for description in descriptions:
        maker = (_part_step if is_one_token else _token_step)(description)
        if maker is None:
            return None
        makers.append(maker)
        is_one_token = is_one_token or description["type"] in ("Fuse", "ByteLevel")
    return lambda: [maker() for maker in makers]


def clean_up_steps() -> list[Step]:
    """The steps of ``clean_up_spaces`` on the parts of a text."""
    return [_ReplaceInParts(spaced, spaced.strip()) for spaced in _SPACED]


def clean_up_spaces(text: str) -> str:
    """A text without the spaces that tokenizers of words leave before punctuation and English contractions.

    Source: ``clean_up_tokenization`` of transformers.
    """
    for spaced in _SPACED:
        text = text.replace(spaced, spaced.strip())
    return text


def push_through(steps: Sequence[Step], token: str) -> str:
    """What is certain behind all ``steps`` with one more token."""
    tokens: Sequence[str] = (token,)
    for step in steps:
        tokens = [out for each in tokens for out in step.push(each)]
    return "".join(tokens)


def end_through(steps: Sequence[Step]) -> str:
    """What is left in all ``steps`` when no more tokens come."""
    tokens: list[str] = []
    for step in steps:
        tokens = [out for each in tokens for out in step.push(each)] + [*step.end()]
    return "".join(tokens)


def byte_of(token: str) -> int | None:
    """The byte that a token such as ``<0x0A>`` stands for; None if it is no such token."""
    match = _BYTE_TOKEN.fullmatch(token)
    return None if match is None else int(match[1], 16)


def byte_run(run: bytes) -> list[str]:
    """The tokens that a run of byte tokens makes: one, or a replacement character for each byte if it is not UTF-8."""
    try:
        return [run.decode()] if run else []
    except UnicodeDecodeError:
        return [REPLACEMENT] * len(run)


def byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level vocabularies: printable Latin-1 is itself, the rest U+0100 and on.

    Source: Radford et al. 2019, GPT-2's ``bytes_to_unicode``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


def bytes_of(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; an added token is written as it is."""
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()


def _token_step(description: Mapping[str, Any]) -> Callable[[], Step] | None:
    """The step of a decoder that takes the tokens one by one."""
    match description:
        case {"type": "Replace", "pattern": pattern, "content": content}:
            decoder = _replace(pattern, content)
            return lambda: _Each(lambda token: decoder.decode([token]))
        case {"type": "Strip", "content": content, "start": start, "stop": stop}:
            return lambda: _Each(lambda token: _stripped(token, content, start, stop))
        case {"type": "Metaspace"}:
            metaspace = _metaspace(description)
            return lambda: _FirstDiffers(metaspace)
        case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
            word_piece = decoders.WordPiece(prefix=prefix, cleanup=cleanup)
            return lambda: _FirstDiffers(word_piece)
        case {"type": "BPEDecoder", "suffix": suffix}:
            bpe = decoders.BPEDecoder(suffix=suffix)
            return lambda: _LastDiffers(bpe)
        case {"type": "CTC", "pad_token": pad, "word_delimiter_token": delimiter, "cleanup": cleanup}:
            ctc = decoders.CTC(pad_token=pad, word_delimiter_token=delimiter, cleanup=cleanup)
            return lambda: _Ctc(ctc)
        case {"type": "ByteFallback"}:
            return _ByteRuns
        case {"type": "ByteLevel"}:
            return _Bytes
        case {"type": "Fuse"}:
            return _Unchanged
        case _:
            return None


def _part_step(description: Mapping[str, Any]) -> Callable[[], Step] | None:
    """The step of a decoder that gets one token in parts; None where it must see the whole."""
    match description:
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if pattern:
            return lambda: _ReplaceInParts(pattern, content)
        case {"type": "Strip", "content": content, "start": start, "stop": stop}:
            return lambda: _StripParts(content, start, stop)
        case {"type": "Metaspace"}:
            metaspace = _metaspace(description)  # treats each character of the first token by itself
            return lambda: _Each(lambda part: metaspace.decode([part]))
        case {"type": "Fuse"}:
            return _Unchanged
        case _:
            return None


def _replace(pattern: Mapping[str, str], content: str) -> Decoder:
    return decoders.Replace(pattern["String"] if "String" in pattern else Regex(pattern["Regex"]), content)


def _metaspace(description: Mapping[str, Any]) -> Decoder:
    return decoders.Metaspace(
        replacement=description["replacement"],
        prepend_scheme=description["prepend_scheme"],
        split=description["split"],
    )


def _stripped(token: str, content: str, start: int, stop: int) -> str:
    # As the library's own, which fails where more is to be stripped than there is.
    first = _num_leading(token, content, start)
    return token[first : len(token) - _num_leading(token[::-1], content, stop)]


def _num_leading(text: str, content: str, limit: int) -> int:
    return min(limit, len(text) - len(text.lstrip(content)))


class _Unchanged:
    def push(self, token: str) -> Sequence[str]:
        return (token,)

    def end(self) -> Sequence[str]:
        return ()


class _Each(_Unchanged):
    """Changes each token, or part, by itself."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self._change = change

    def push(self, token: str) -> Sequence[str]:
        return (self._change(token),)


class _FirstDiffers(_Unchanged):
    """A decoder that treats the first token otherwise than all others."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._before: list[str] = []

    def push(self, token: str) -> Sequence[str]:
        text = self._decoder.decode([*self._before, token])
        self._before = [""]  # as the first, it has no text
        return (text,)


class _LastDiffers:
    """A decoder that treats the last token otherwise than all others."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._last: str | None = None

    def push(self, token: str) -> Sequence[str]:
        last, self._last = self._last, token
        return () if last is None else (self._decoder.decode([last, ""]),)

    def end(self) -> Sequence[str]:
        return () if self._last is None else (self._decoder.decode([self._last]),)


class _Spaced(_Unchanged):
    """What joins tokens where there is no decoder."""

    def __init__(self) -> None:
        self._between = ""

    def push(self, token: str) -> Sequence[str]:
        text, self._between = self._between + token, " "
        return (text,)


class _Ctc(_Unchanged):
    """Takes repeated tokens once, and leaves out those without text."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._last: str | None = None

    def push(self, token: str) -> Sequence[str]:
        if token == self._last:
            return ()
        self._last = token
        text = self._decoder.decode([token])
        return (text,) if text else ()


class _ByteRuns:
    """Makes one token of a run of byte tokens, or one for each byte where they are not UTF-8."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, token: str) -> Sequence[str]:
        byte = byte_of(token)
        if byte is None:
            return (*self.end(), token)
        self._run.append(byte)
        return ()

    def end(self) -> Sequence[str]:
        run = bytes(self._run)
        self._run.clear()
        return byte_run(run)


class _Bytes:
    """Reads all tokens as the bytes of one text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> Sequence[str]:
        return (self._decoder.decode(bytes_of(token)),)

    def end(self) -> Sequence[str]:
        return (self._decoder.decode(b"", final=True),)


class _ReplaceInParts:
    """Replaces a string in a text that comes in parts."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content
        self._held = ""

    def push(self, token: str) -> Sequence[str]:
        *whole, rest = (self._held + token).split(self._pattern)
        longest = min(len(rest), len(self._pattern) - 1)
        num_held = next(n for n in range(longest, -1, -1) if rest.endswith(self._pattern[:n]))
        first_held = len(rest) - num_held
        self._held = rest[first_held:]
        return (self._content.join([*whole, rest[:first_held]]),)

    def end(self) -> Sequence[str]:
        held, self._held = self._held, ""
        return (held,)


class _StripParts:
    """Strips a text that comes in parts."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content = content
        self._start = start
        self._stop = stop
        self._num_held = 0

    def push(self, token: str) -> Sequence[str]:
        if self._start:
            num_leading = len(token) - len(token.lstrip(self._content))
            num_stripped = min(self._start, num_leading)
            is_all = num_leading == len(token)
            self._start = self._start - num_stripped if is_all else 0
            token = token[num_stripped:]
        if not token:
            return ()
        token = self._content * self._num_held + token
        self._num_held = _num_leading(token[::-1], self._content, self._stop)
        return (token[: len(token) - self._num_held],)

    def end(self) -> Sequence[str]:
        self._num_held = 0
        return ()
