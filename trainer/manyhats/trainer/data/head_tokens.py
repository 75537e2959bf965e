"""The texts of a head's data as tokens, as the server makes them of the same texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manyhats.engine.errors import PromptTooLongError
from manyhats.engine.text.tokenizer import ReadText, Tokenizer, TokenSpan
from manyhats.trainer.data.head_contents import HeadContents, LabelledText, RelatedTexts, TaggedWords
from manyhats.trainer.data.row import Row
from manyhats.trainer.settings.settings import DataSettings

NOTHING = -1
"""The token of a word that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReading:
    """How texts become tokens.

    Attributes:
        tokenizer: the base's, or the task's.
        head: see ``HeadSettings``.
        settings: what to do with texts that are too long.
        max_length: of a text in tokens.
        vocab_size: the number of rows of the base's embedding.
        padding_id: the token that the base does not read, if there is one.
        on_row: called at each row; an exception from it ends the reading.
    """

    tokenizer: Tokenizer
    head: str
    settings: DataSettings
    max_length: int
    vocab_size: int
    padding_id: int | None = None
    on_row: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class ReadContents:
    """The texts of a row as tokens.

    Attributes:
        words: for each word that has a tag, the token that stands for it, or ``NOTHING``.
        is_truncated: whether a text was cut.
    """

    texts: tuple[ReadText, ...]
    words: tuple[int, ...] = ()
    is_truncated: bool = False


def read_contents(row: Row, contents: HeadContents, how: TextReading) -> ReadContents | None:
    """The texts of a row as tokens; None if one is too long and such rows are left out.

    Raises:
        DataError: a text has no tokens, is too long, or has a token that the base does not read; names the field.
    """
    match contents:
        case LabelledText(text, None, _):
            given: list[tuple[str, str, str | None]] = [("text", text, None)]
        case LabelledText(text, pair, _):
            given = [("text_pair", pair or "", text)]
        case TaggedWords(words, _):
            given = [("tokens", " ".join(words), None)]
        case RelatedTexts(query, positive, negatives):
            others = [(f"negatives[{index}]", text, None) for index, text in enumerate(negatives)]
            given = [("query", query, None), ("positive", positive, None), *others]
    texts: list[ReadText] = []
    is_truncated = False
    for field, text, first in given:
        whole = how.tokenizer.read(text, add_special_tokens=True, first=first)
        read = _fitted(row, field, whole, text, first, how)
        if read is None:
            return None
        is_truncated |= read is not whole
        _check_tokens(row, field, read, how)
        texts.append(read)
    tokens = _words(contents.words, texts[0], how.tokenizer) if isinstance(contents, TaggedWords) else ()
    return ReadContents(tuple(texts), tokens, is_truncated)


def _fitted(
    row: Row, field: str, whole: ReadText, text: str, first: str | None, how: TextReading
) -> ReadText | None:
    """The text within the length, cut as the server cuts it; None if it is left out."""
    length = len(whole.token_ids)
    if length <= how.max_length:
        return whole
    if how.settings.overlong == "error":
        raise row.error(
            f"{field}: has {length} tokens; the limit is {how.max_length} (`max_length`): set `overlong` to skip or "
            "truncate"
        )
    if how.settings.overlong == "skip":
        return None
    try:
        return how.tokenizer.read(
            text, add_special_tokens=True, first=first, max_tokens=how.max_length, truncates=True
        )
    except PromptTooLongError as error:
        raise row.error(f"{field}: {error.description}") from error


def _check_tokens(row: Row, field: str, read: ReadText, how: TextReading) -> None:
    if not read.token_ids:
        raise row.error(f"{field}: has no tokens")
    if how.padding_id in read.token_ids:
        raise row.error(f"{field}: has the token {how.padding_id}, which is padding and not read by the base")
    largest = max(read.token_ids)
    if largest >= how.vocab_size:
        piece = how.tokenizer.piece(largest)
        raise row.error(
            f"{field}: has the token {largest} ({piece!r}); the base's embedding has {how.vocab_size} rows"
        )


def _words(words: Sequence[str], read: ReadText, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The first token of each word, in words joined by spaces; a token stands for one word, the first it is part of."""
    spans = tokenizer.spans(" ".join(words), add_special_tokens=True, max_tokens=len(read.token_ids))
    found, start, token = [], 0, 0
    for word in words:
        end = start + len(word)
        while token < len(spans) and not _reaches(spans[token], start):
            token += 1
        if token < len(spans) and spans[token].start < end:
            found.append(token)
            token += 1
        else:
            found.append(NOTHING)
        start = end + 1
    return tuple(found)


def _reaches(span: TokenSpan, start: int) -> bool:
    """Whether a token has characters from ``start`` on."""
    return span.end > span.start and span.end > start
