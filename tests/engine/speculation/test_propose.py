from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine.speculation.drafter import Drafter
from manyhats.engine.speculation.pace import Pace
from manyhats.engine.speculation.propose import MAX_MATCH, PromptLookup, longest_match

TEXTS = st.lists(st.integers(0, 5), max_size=30)


def half(token_id: int) -> int:
    return token_id // 2


def lookup_of(text: list[int], num_prompt: int) -> PromptLookup:
    lookup = PromptLookup(text[:num_prompt], half)
    for token_id in text[num_prompt:]:
        lookup.append(token_id)
    return lookup


def match(text: list[int]) -> tuple[int, int]:
    """Slow and obvious: each length from the longest on, each place from the latest on."""
    for length in range(min(MAX_MATCH, len(text)), 0, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                return length, end
    return 0, 0


def proposal(text: list[int], max_tokens: int, ends: set[int]) -> list[int]:
    length, end = match(text)
    like_length, like_end = match([half(token_id) for token_id in text])
    if like_length > length:
        length, end = like_length, like_end
    proposed: list[int] = []
    while length and len(proposed) < max_tokens:
        token_id = (text + proposed)[end + len(proposed)]
        if token_id in ends:
            break
        proposed.append(token_id)
    return proposed


@given(TEXTS)
def test_the_longest_end_that_occurs_before_is_found_where_it_was_last(text: list[int]) -> None:
    assert longest_match(np.array(text, dtype=np.int64)) == match(text)


@given(TEXTS.filter(bool), st.data())
def test_proposals_equal_a_slow_search(text: list[int], data: st.DataObject) -> None:
    lookup = lookup_of(text, data.draw(st.integers(1, len(text))))
    max_tokens, ends = data.draw(st.integers(1, 12)), data.draw(st.sets(st.integers(0, 5), max_size=2))
    assert lookup.propose(max_tokens, ends) == proposal(text, max_tokens, ends)


def test_what_followed_a_longer_end_goes_before_what_came_later() -> None:
    assert lookup_of([1, 2, 3, 9, 5, 3, 8, 1, 2, 3], 10).propose(2) == [9, 5]
    assert lookup_of([7, 3, 9, 5, 3, 8, 1, 2, 3], 9).propose(1) == [8]


def test_a_repetition_goes_on() -> None:
    assert lookup_of([4, 1, 2, 1, 2, 1], 3).propose(5) == [2, 1, 2, 1, 2]


def test_what_is_only_alike_is_found_if_nothing_else_is() -> None:
    assert lookup_of([10, 4, 7, 11], 4).propose(2) == [4, 7]
    assert lookup_of([10, 4, 11, 6, 10], 5).propose(1) == [4]


def test_a_pace_grows_after_drafts_that_all_came_and_falters_after_useless_ones() -> None:
    pace = Pace(7)
    assert pace.next() == 3
    pace.note(3, 3)
    assert pace.next() == 7
    pace.note(7, 4)
    assert pace.next() == 3
    pace.note(3, 0)
    assert pace.next() == 3
    pauses = []
    for _ in range(7):
        pace.note(3, 0)
        pause = 0
        while not pace.next():
            pause += 1
        pauses.append(pause)
    assert pauses == [1, 2, 4, 8, 16, 16, 16]
    pace.note(3, 1)
    assert pace.next() == 3
    pace.note(3, 0)
    assert pace.next() == 3


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_a_pace_is_never_over_what_is_allowed(max_tokens: int) -> None:
    pace = Pace(max_tokens)
    assert pace.next() == max_tokens
    pace.note(max_tokens, max_tokens)
    assert pace.next() == max_tokens


def test_a_drafter_counts_the_drafts_that_came() -> None:
    drafter = Drafter([1, 2, 3, 4, 9, 1], half, {9}, 7)
    assert drafter.draft(0) == []
    assert drafter.draft(1) == [2]
    assert drafter.draft(2) == [2, 3]
    assert drafter.take([2, 3, 4], [2, 3]) == 2
    assert drafter.draft(7) == []  # nothing goes before what ends an answer
    assert drafter.take([8], []) == 0
    assert drafter.take([1, 5], [1, 2, 3]) == 1
    assert drafter.draft(2) == [8, 1]  # a 4 is like a 5


def test_one_token_before_an_end_is_not_drafted() -> None:
    drafter = Drafter([7, 3, 9, 7], half, {9}, 7)
    assert drafter.draft(4) == []
    assert drafter.draft(1) == [3]
