"""The steps of decoding one text: each does what one decoder of the ``tokenizers`` library does.

A step emits, at each token, what no later token can change. After a decoder that merges everything into one token
(``Fuse``, ``ByteLevel``), steps take parts of that one instead of tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers.decoders import Decoder

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Two hexadecimal digits as Rust reads them: they may begin with a sign.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class Step(Protocol):
    """One decoder of a chain, decoding one text; copies are independent."""

    def push(self, token: str) -> Sequence[str]:
        """What becomes certain with one more token, or one more part of the single token."""

    def end(self) -> Sequence[str]:
        """What remains when no more come."""


def byte_of(token: str) -> int | None:
    """The byte that a token such as ``<0x0A>`` stands for; None if it is not such a token."""
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


def stripped(token: str, content: str, start: int, stop: int) -> str:
    """A token with up to ``start`` and ``stop`` of a character removed from its ends.

    The library's own fails if more is to be stripped than there is.
    """
    first = _num_leading(token, content, start)
    return token[first : len(token) - _num_leading(token[::-1], content, stop)]


def _num_leading(text: str, content: str, limit: int) -> int:
    return min(limit, len(text) - len(text.lstrip(content)))


class Unchanged:
    """Emits each token, or part, unchanged."""

    def push(self, token: str) -> Sequence[str]:
        """See ``Step``."""
        return (token,)

    def end(self) -> Sequence[str]:
        """See ``Step``."""
        return ()


class Each(Unchanged):
    """Changes each token, or part, separately."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self._change = change

    def push(self, token: str) -> Sequence[str]:
        """See ``Step``."""
        return (self._change(token),)


class FirstDiffers(Unchanged):
    """A decoder that treats the first token differently from all others."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._before: list[str] = []

    def push(self, token: str) -> Sequence[str]:
        """See ``Step``."""
        text = self._decoder.decode([*self._before, token])
        self._before = [""]  # as the first token, it has no text
        return (text,)


class LastDiffers:
    """A decoder that treats the last token differently from all others."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._last: str | None = None

    def push(self, token: str) -> Sequence[str]:
        """See ``Step``."""
        last, self._last = self._last, token
        return () if last is None else (self._decoder.decode([last, ""]),)

    def end(self) -> Sequence[str]:
        """See ``Step``."""
        return () if self._last is None else (self._decoder.decode([self._last]),)


class Spaced(Unchanged):
    """Joins tokens if there is no decoder."""

    def __init__(self) -> None:
        self._between = ""

    def push(self, token: str) -> Sequence[str]:
        """See ``Step``."""
        text, self._between = self._between + token, " "
        return (text,)


class Ctc(Unchanged):
    """Takes repeated tokens once, and drops those without text."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._last: str | None = None

    def push(self, token: str) -> Sequence[str]:
        """See ``Step``."""
        if token == self._last:
            return ()
        self._last = token
        text = self._decoder.decode([token])
        return (text,) if text else ()


class ByteRuns:
    """Makes one token from a run of byte tokens, or one for each byte if they are not UTF-8."""

    def __init__(self) -> None:
        self._run = b""

    def push(self, token: str) -> Sequence[str]:
        """See ``Step``."""
        byte = byte_of(token)
        if byte is None:
            return (*self.end(), token)
        self._run += bytes((byte,))
        return ()

    def end(self) -> Sequence[str]:
        """See ``Step``."""
        run, self._run = self._run, b""
        return byte_run(run)


class Bytes:
    """Reads all tokens as the bytes of one text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __copy__(self) -> Bytes:
        """A copy with its own state."""
        other = Bytes()
        other._decoder.setstate(self._decoder.getstate())
        return other

    def push(self, token: str) -> Sequence[str]:
        """See ``Step``."""
        return (self._decoder.decode(bytes_of(token)),)

    def end(self) -> Sequence[str]:
        """See ``Step``."""
        return (self._decoder.decode(b"", final=True),)


class ReplaceInParts:
    """Replaces a string in a text that comes in parts."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content
        self._held = ""

    def push(self, token: str) -> Sequence[str]:
        """See ``Step``."""
        *whole, rest = (self._held + token).split(self._pattern)
        longest = min(len(rest), len(self._pattern) - 1)
        num_held = next(n for n in range(longest, -1, -1) if rest.endswith(self._pattern[:n]))
        first_held = len(rest) - num_held
        self._held = rest[first_held:]
        return (self._content.join([*whole, rest[:first_held]]),)

    def end(self) -> Sequence[str]:
        """See ``Step``."""
        held, self._held = self._held, ""
        return (held,)


class StripParts:
    """Strips a text that comes in parts."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content = content
        self._start = start
        self._stop = stop
        self._num_held = 0

    def push(self, token: str) -> Sequence[str]:
        """See ``Step``."""
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
        """See ``Step``."""
        self._num_held = 0
        return ()
