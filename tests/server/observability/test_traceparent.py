"""What a caller's ``traceparent`` says, by W3C's rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.server.observability.traceparent import Parent, new_trace_id, read_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("value", "is_sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-02", False),
        (f"00-{TRACE}-{SPAN}-ff", True),
        (f" 00-{TRACE}-{SPAN}-01\t", True),
        (f"cc-{TRACE}-{SPAN}-01", True),
        (f"cc-{TRACE}-{SPAN}-01-what-will-be", True),
    ],
)
def test_what_is_well_formed_is_read(value: str, is_sampled: bool) -> None:
    assert read_traceparent([value]) == Parent(TRACE, SPAN, is_sampled)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [""],
        [f"00-{TRACE}-{SPAN}-01"] * 2,
        [f"00-{TRACE}-{SPAN}"],
        [f"00-{TRACE}-{SPAN}-01-more"],
        [f"00-{TRACE}-{SPAN}-01-"],
        [f"cc-{TRACE}-{SPAN}-01.more"],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE.upper()}-{SPAN}-01"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE[:-1]}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-1"],
        [f"00-{TRACE}-{SPAN}-01\n"],
        [f"00-{'٣' * 32}-{SPAN}-01"],
    ],
)
def test_anything_else_is_no_parent(values: list[str]) -> None:
    assert read_traceparent(values) is None


@given(st.lists(st.text(max_size=80), max_size=3))
def test_no_header_is_an_error(values: list[str]) -> None:
    read_traceparent(values)


def test_new_ids_are_ids() -> None:
    ids = {new_trace_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(read_traceparent([f"00-{each}-{SPAN}-01"]) for each in ids)
