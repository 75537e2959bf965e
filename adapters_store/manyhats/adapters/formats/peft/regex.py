r"""Python's regular expressions, run by RE2: in time that grows with the text alone, and within a memory limit.

PEFT's configs hold patterns for Python's ``re``, which backtracks: from a file that is not trusted, one of a few
characters could run for years. RE2 does not backtrack; what it cannot do is refused by name: lookaround,
backreferences, conditions, atomic groups and possessive repetition.

A pattern is read as Python reads it, and written down anew for RE2, so that nothing can mean one thing to the one and
another to the other: ``[[:alpha:]]``, ``x{,3}``, ``\Z``, ``\_``, or ``[a&&b]``. Texts are ASCII without line breaks, as
module paths are. On these ``\d``, ``\w``, ``.`` and ``$`` mean the same to both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import re2

from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, AdapterUnsupportedError, shown

_MAX_LENGTH = 4096
_MAX_DEPTH = 100
# RE2's own limit, for nested repetitions multiplied.
_MAX_REPEATS = 1000
# RE2 checks its memory only once it has unrolled the repetitions, so this comes first. It also bounds the time: of the
# worst patterns of this size, a module's path takes up to 4 ms.
_MAX_SIZE = 2**18
_MAX_MEMORY = 64 * 1024 * 1024

_TOKEN = re.compile(
    r"""
      (?P<open> \( (?: \?: | \?P<(?P<name>[A-Za-z_][A-Za-z0-9_]*)> | (?!\?) ) )
    | (?P<flags> \(\? (?P<on>[ims]*) (?: -(?P<off>[ims]+) )? : )
    | (?P<foreign> \(\? (?: <?[=!] | P= | [(>\#] | [aiLmsux]+(?:-[imsx]+)?[:)] ) )
    | (?P<close> \) )
    | (?P<set> \[ \^?+ \]?+ (?: [^\]\\] | \\. )*+ \] )
    | (?P<repeat> (?: [*+?] | \{(?!\}) (?P<least>[0-9]*) (?P<range>,(?P<most>[0-9]*))? \} ) (?P<mode>[?+]?) )
    | (?P<assertion> [\^$] )
    | (?P<either> \| )
    | (?P<any> \. )
    | (?P<escape> \\x[0-9A-Fa-f]{2} | \\. )
    | (?P<literal> [^(\[\\] )
    """,
    re.VERBOSE | re.DOTALL,
)
_SET_ITEM = re.compile(r"\\x[0-9A-Fa-f]{2}|\\.|.", re.DOTALL)
_FOREIGN = {
    "(?=": "a lookahead",
    "(?!": "a lookahead",
    "(?<": "a lookbehind",
    "(?P": "a backreference",
    "(?(": "a condition",
    "(?>": "an atomic group",
    "(?#": "a comment",
}
_CLASSES = frozenset("dDsSwW")
_ASSERTIONS = {"A": r"\A", "Z": r"\z", "b": r"\b", "B": r"\B"}
_CONTROLS = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11}
_DIGITS = frozenset("0123456789")
_CODE_POINTS = frozenset("uUN")


@dataclass(frozen=True, slots=True)
class Regex:
    """A regular expression in RE2's syntax, without captures.

    Attributes:
        text: complete in itself: all groups are closed, and nothing before it is repeated.
        size: its characters, sets, operators and groups, repetitions unrolled.
    """

    text: str
    size: int


class RegexSet:
    """Regular expressions that are matched against a text all at once."""

    def __init__(self, subject: str, patterns: Iterable[Regex]) -> None:
        """Compile patterns.

        Args:
            subject: the field they come from, for errors.
            patterns: the first that matches counts; none is asked for once they are too large.

        Raises:
            AdapterTooLargeError: they repeat too often, or are too large together.
        """
        too_large = AdapterTooLargeError(
            subject,
            f"has patterns of over {_MAX_SIZE} characters with repetitions written out, or repeats over "
            f"{_MAX_REPEATS} times",
        )
        options = re2.Options()
        options.encoding = re2.Options.Encoding.LATIN1
        options.log_errors = False
        options.max_mem = _MAX_MEMORY
        options.never_capture = True
        self._set = re2.Set.FullMatchSet(options)
        size = 0
        try:
            for pattern in patterns:
                size += pattern.size
                if size > _MAX_SIZE:
                    raise too_large
                self._set.Add(pattern.text.encode("ascii"))
            # The last matches any text: without it among the answers, the search itself failed.
            self._last: int = self._set.Add(b"(?s:.*)")
            self._set.Compile()
        except re2.error:
            raise too_large from None

    def first_match(self, text: str) -> int | None:
        """The number of the first pattern that matches all of a text; None if none does."""
        found = self._set.Match(text.encode("ascii"))
        assert found is not None, "RE2 ran out of memory"
        first = min(found)
        return None if first == self._last else first


def translate(pattern: str, subject: str, name: str) -> Regex:
    """A regular expression of Python's ``re`` in RE2's syntax.

    Args:
        pattern: as Python reads it.
        subject: the field it comes from, for errors.
        name: what it is there, for errors.

    Raises:
        AdapterInvalidError: Python does not read it either.
        AdapterUnsupportedError: it needs what RE2 does not have, or characters other than ASCII.
        AdapterTooLargeError: it has over 4096 characters, over 1000 repetitions, or groups over 100 deep.
    """
    try:
        if len(pattern) > _MAX_LENGTH:
            raise _TooLargeError(f"is longer than {_MAX_LENGTH} characters")
        if not pattern.isascii():
            raise _UnsupportedError("characters other than ASCII")
        translation = _Translation(pattern)
        return Regex("".join(translation.pieces()), translation.size)
    except _InvalidError as error:
        description = f"{name} '{shown(pattern)}' is not a regular expression: {error}"
        raise AdapterInvalidError(subject, description) from None
    except _UnsupportedError as error:
        description = f"{name} '{shown(pattern)}' uses {error}, which is not supported in a pattern"
        raise AdapterUnsupportedError(subject, description) from None
    except _TooLargeError as error:
        raise AdapterTooLargeError(subject, f"{name} '{shown(pattern)}' {error}") from None


def translate_ending(pattern: str, subject: str, name: str) -> Regex:
    """As ``translate``; it also matches a module's path that ends, after a dot, with what the pattern matches."""
    regex = translate(pattern, subject, name)
    return Regex(rf"(?:.*\.)?(?:{regex.text})", regex.size)


class _InvalidError(ValueError):
    """Python does not read the pattern."""


class _UnsupportedError(ValueError):
    """What in the pattern is not supported."""


class _TooLargeError(ValueError):
    """What about the pattern is too large."""


class _Translation:
    """Reads a pattern from its start to its end; RE2's syntax comes out piece by piece."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._names: set[str] = set()
        # Of the whole, and of each open group within.
        self._sizes = [0]
        # Of the last piece: 0 if it can't be repeated.
        self._item_size = 0
        self._is_repeated = False

    @property
    def size(self) -> int:
        """As ``Regex`` counts it, of what has been read."""
        return self._sizes[0]

    def pieces(self) -> Iterator[str]:
        at = 0
        while at < len(self._pattern):
            token = _TOKEN.match(self._pattern, at)
            if token is None:
                raise _unreadable(self._pattern[at:])
            yield self._translate(token)
            at = token.end()
        if len(self._sizes) > 1:
            raise _InvalidError("a group is not closed")

    def _translate(self, token: re.Match[str]) -> str:
        kind, text = token.lastgroup, token[0]
        if kind == "repeat":
            return self._repeat(token)
        self._is_repeated = False
        if kind in ("open", "flags"):
            return self._open(token)
        if kind == "foreign":
            raise _UnsupportedError(_FOREIGN.get(text[:3], f"flags as in {shown(text)}"))
        if kind == "close":
            return self._close()
        if kind == "set":
            pieces = list(_pieces_of_set(text))
            return self._item("".join(pieces), len(pieces))
        if kind == "escape" and text[1] in _ASSERTIONS:
            return self._item(_ASSERTIONS[text[1]], 1, is_repeatable=False)
        if kind in ("assertion", "either"):
            return self._item(text, 1, is_repeatable=False)
        if kind == "any":
            return self._item(text, 1)
        code = _code_of(text)
        return self._item(text if code is None else _literal(code), 1)

    def _item(self, text: str, size: int, *, is_repeatable: bool = True) -> str:
        self._sizes[-1] += size
        self._item_size = size if is_repeatable else 0
        return text

    def _open(self, token: re.Match[str]) -> str:
        if len(self._sizes) > _MAX_DEPTH:
            raise _TooLargeError(f"has groups over {_MAX_DEPTH} deep")
        name = token["name"]
        if name in self._names:
            raise _InvalidError(f"it has two groups called {shown(name)}")
        if name is not None:
            self._names.add(name)
        if set(token["on"] or "") & set(token["off"] or ""):
            raise _InvalidError("a flag is turned on and off")
        self._sizes.append(0)
        self._item_size = 0
        return token[0] if token["flags"] else "(?:"

    def _close(self) -> str:
        size = self._sizes.pop()
        if not self._sizes:
            raise _InvalidError("it closes a group that is not open")
        return self._item(")", size + 1)

    def _repeat(self, token: re.Match[str]) -> str:
        if self._is_repeated:
            raise _InvalidError("a repetition is repeated")
        if self._item_size == 0:
            raise _InvalidError("there is nothing to repeat")
        if token["mode"] == "+":
            raise _UnsupportedError("possessive repetition")
        self._is_repeated = True
        if token["least"] is None:
            self._sizes[-1] += 1
            return token[0]
        least = _parse_count(token["least"] or "0")
        is_exact = token["range"] is None
        most = least if is_exact else _parse_count(token["most"]) if token["most"] else None
        if most is not None and most < least:
            raise _InvalidError("a repetition's bounds are the wrong way round")
        self._sizes[-1] += self._item_size * max(least if most is None else most, 1)
        bounds = str(least) if is_exact else f"{least},{'' if most is None else most}"
        return f"{{{bounds}}}{token['mode']}"


def _unreadable(rest: str) -> _InvalidError:
    if rest.startswith("["):
        return _InvalidError("a set of characters is not closed")
    if rest.startswith("("):
        return _InvalidError("a group begins with an unknown extension")
    return _InvalidError("it ends with a backslash")


def _parse_count(digits: str) -> int:
    if len(digits) > len(str(_MAX_REPEATS)) or int(digits) > _MAX_REPEATS:
        raise _TooLargeError(f"repeats over {_MAX_REPEATS} times")
    return int(digits)


def _pieces_of_set(text: str) -> Iterator[str]:
    """A set of characters, such as ``[^a-z_]``."""
    is_negated = text.startswith("[^")
    items = _SET_ITEM.findall(text, 2 if is_negated else 1, len(text) - 1)
    yield "[^" if is_negated else "["
    at = 0
    while at < len(items):
        code = _code_of(items[at])
        if items[at + 1 : at + 2] == ["-"] and at + 2 < len(items):
            last = _code_of(items[at + 2])
            if code is None or last is None or last < code:
                raise _InvalidError("a set of characters has a bad range")
            yield f"{_literal(code)}-{_literal(last)}"
            at += 3
        else:
            yield items[at] if code is None else _literal(code)
            at += 1
    yield "]"


def _code_of(item: str) -> int | None:
    r"""The character that one of a pattern or of a set stands for; None if it is a class such as ``\d``."""
    letter = item[1:]
    if letter == "" or letter in _CLASSES:
        return None if letter else ord(item)
    if letter in _CONTROLS:
        return _CONTROLS[letter]
    if len(letter) > 1:
        return int(letter[1:], 16)
    if letter in _DIGITS:
        raise _UnsupportedError("a backreference or an octal number")
    if letter in _CODE_POINTS:
        raise _UnsupportedError(f"a character by its code, {item}")
    if letter.isalpha():
        raise _InvalidError(f"the escape {item} is unknown")
    return ord(letter)


def _literal(code: int) -> str:
    character = chr(code)
    return character if character.isascii() and character.isalnum() else f"\\x{code:02x}"
