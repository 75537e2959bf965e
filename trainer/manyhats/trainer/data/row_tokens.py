"""A row's tokens, which of them are learned, and what is kept within a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyhats.trainer.data.dataset import LabelTokens
from manyhats.trainer.data.row import Row


@dataclass(frozen=True, slots=True)
class RowTokens:
    """A row's tokens.

    Attributes:
        targets: spans of what is learned, in order, none empty.
        prompt_length: where the last completion begins; 0 for a text, which is all completion.
        completion: the last one's text; empty for a text.
        labels: alternatives to it.
    """

    token_ids: Sequence[int]
    targets: Sequence[tuple[int, int]]
    prompt_length: int
    completion: str
    labels: tuple[LabelTokens, ...] = ()

    def is_target(self) -> bytes:
        """One byte per token, 0 or 1."""
        marks = bytearray(len(self.token_ids))
        for begin, end in self.targets:
            marks[begin:end] = b"\x01" * (end - begin)
        return bytes(marks)


def fitted(row: Row, tokens: RowTokens, overlong: str, max_length: int) -> RowTokens | None:
    """The row within the length; None if it is left out.

    Args:
        row: the one the tokens come from.
        tokens: of any length.
        overlong: see ``DataSettings``.
        max_length: in tokens, at least 2.

    Raises:
        DataError: it is longer, and ``overlong`` makes that an error.
    """
    length = len(tokens.token_ids)
    if length <= max_length:
        return tokens
    if overlong == "error":
        raise row.error(
            f"has {length} tokens; the limit is {max_length} (`max_length`): set `overlong` to skip or truncate"
        )
    if overlong == "skip":
        return None
    if not tokens.prompt_length:
        return RowTokens(tokens.token_ids[:max_length], [(1, max_length)], 0, "")
    return _without_beginning(tokens, length - max_length)


def _without_beginning(tokens: RowTokens, num_cut: int) -> RowTokens | None:
    """The row without its first tokens; None if nothing is left before the last completion."""
    left = tokens.prompt_length - num_cut
    if left < 1 or any(left - label.num_taken < 1 for label in tokens.labels):
        return None
    # The first remaining token has nothing before it to be predicted from.
    spans = [(max(begin - num_cut, 1), end - num_cut) for begin, end in tokens.targets]
    return RowTokens(
        token_ids=tokens.token_ids[num_cut:],
        targets=[(begin, end) for begin, end in spans if begin < end],
        prompt_length=left,
        completion=tokens.completion,
        labels=tokens.labels,
    )
