"""What is left of texts that have too many tokens: special tokens stay, as in the ``tokenizers`` library.

The library's own truncation also returns what it cuts off, in pieces: of a pair, every piece of one with every piece
of the other.
"""

from __future__ import annotations

from bisect import bisect_left

from tokenizers import Encoding

from manyhats.engine.errors import PromptTooLongError


def kept(encoding: Encoding, max_tokens: int) -> list[slice]:
    """The parts of a text's tokens, or a pair's, that are kept where ``max_tokens`` are too few for all.

    Texts lose their last tokens. Of a pair, the longer one is cut to the other's length, and then both.

    Raises:
        PromptTooLongError: ``text``: special tokens alone leave no room.
    """
    texts, end = [], 0
    for number in range(encoding.n_sequences):
        begin = next((i for i in range(end, len(encoding)) if encoding.token_to_sequence(i) is not None), end)
        end = _end(encoding, begin, number)
        texts.append((begin, end))
    lengths = [end - begin for begin, end in texts]
    room = max_tokens - (len(encoding) - sum(lengths))
    if room <= 0:
        raise PromptTooLongError("text", max_tokens - room + 1, max_tokens)
    parts, since = [], 0
    for (begin, end), length in zip(texts, _cut(lengths, room), strict=True):
        parts.append(slice(since, begin + length))
        since = end
    return [*parts, slice(since, len(encoding))]


def _end(encoding: Encoding, begin: int, number: int) -> int:
    """Where a text's tokens end, which follow each other."""

    def is_behind(index: int) -> bool:
        return encoding.token_to_sequence(index) != number

    return begin + bisect_left(range(begin, len(encoding)), True, key=is_behind)


def _cut(lengths: list[int], room: int) -> list[int]:
    """What is left of one or two lengths."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    first, second = lengths
    half = room // 2
    short = min(first, second, half)
    return [short, room - short] if first <= second else [room - short, short]
