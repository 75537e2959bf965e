"""What may follow a text, looked up in the text itself: whatever came after an earlier occurrence of how it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

MAX_MATCH = 3
"""Longer ends of the text are not looked for: of two occurrences that share this many tokens, the later counts."""


class PromptLookup:
    """Proposes tokens from a sequence's prompt and output.

    It looks for the longest end of the text, of up to ``MAX_MATCH`` tokens, that occurs before, and for its latest
    occurrence. An occurrence counts whose tokens are only *like* the end's, so that a word is found whose case or whose
    space is different; of two as long, the one with the same tokens goes first.

    Args:
        token_ids: the prompt.
        likeness: a number for each token, the same for tokens that are alike.
    """

    def __init__(self, token_ids: Sequence[int], likeness: Callable[[int], int]) -> None:
        self._likeness = likeness
        self._likenesses: dict[int, int] = {}
        self._size = len(token_ids)
        self._ids: Numbers = np.array(token_ids, dtype=np.int64)
        self._alike: Numbers = np.array([self._like(token_id) for token_id in token_ids], dtype=np.int64)

    def append(self, token_id: int) -> None:
        """Add a token of the output."""
        if self._size == self._ids.size:
            self._ids = np.resize(self._ids, 2 * self._size)
            self._alike = np.resize(self._alike, 2 * self._size)
        self._ids[self._size], self._alike[self._size] = token_id, self._like(token_id)
        self._size += 1

    def propose(self, max_tokens: int, ends: Collection[int] = ()) -> list[int]:
        """Up to ``max_tokens`` tokens that may come next, up to the first of ``ends``; none if nothing is like the end.

        Where the text has fewer tokens after the occurrence, it is taken to go on repeating them.
        """
        length, start = longest_match(self._ids[: self._size])
        like_length, like_start = longest_match(self._alike[: self._size])
        if like_length > length:
            length, start = like_length, like_start
        if not length:
            return []
        following = self._ids[start : min(start + max_tokens, self._size)].tolist()
        proposed = [following[index % len(following)] for index in range(max_tokens)]
        return proposed[: next((at for at, token_id in enumerate(proposed) if token_id in ends), max_tokens)]

    def _like(self, token_id: int) -> int:
        if token_id not in self._likenesses:
            self._likenesses[token_id] = self._likeness(token_id)
        return self._likenesses[token_id]


def longest_match(numbers: Numbers) -> tuple[int, int]:
    """The longest end of some numbers, up to ``MAX_MATCH`` of them, that occurs earlier too.

    Returns:
        its length, 0 if even the last number is new; and where its latest earlier occurrence ends, exclusive.
    """
    last = numbers.size - 1
    found = (0, 0)
    if last < 1:
        return found
    at = np.flatnonzero(numbers[:last] == numbers[last])
    for length in range(1, MAX_MATCH + 1):
        if not at.size:
            break
        found = (length, int(at[-1]) + 1)
        at = at[at >= length]
        at = at[numbers[at - length] == numbers[last - length]]
    return found
