from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.errors import TaskIdInvalidError
from manyhats.adapters.taskid import TaskName, check_task_id, parse_name

GOOD = ("a", "0", "fr-lora", "a.b_c-d", "a" * 63, "1a")
BAD = (
    "",
    "A",
    "a" * 64,
    "-a",
    "a-",
    ".a",
    "a.",
    "..",
    "a/b",
    "../a",
    "a\\b",
    "a,b",
    "a b",
    "a\n",
    "\na",
    "a\0",
    "é",
    "a@",
    "a:b",
    "a\u202eb",
)


@pytest.mark.parametrize("task_id", GOOD)
def test_task_ids_pass(task_id: str) -> None:
    assert check_task_id(task_id) == task_id
    assert parse_name(task_id) == TaskName(task_id)


@pytest.mark.parametrize("task_id", BAD)
def test_other_task_ids_are_refused(task_id: str) -> None:
    with pytest.raises(TaskIdInvalidError) as caught:
        parse_name(task_id)
    assert (caught.value.reason, caught.value.subject) == ("FIELD_INVALID", "task_id")


def test_a_name_may_give_a_version() -> None:
    assert parse_name("fr@12") == TaskName("fr", 12)
    assert str(parse_name("fr@12")) == "fr@12"


@pytest.mark.parametrize(
    "name", ["fr@0", "fr@-1", "fr@01", "fr@1@2", "fr@x", "fr@ 1", "fr@1\n", "fr@٣", "@1", "fr@9999999999"]
)
def test_malformed_versions_are_refused(name: str) -> None:
    with pytest.raises(TaskIdInvalidError):
        parse_name(name)


@given(st.text(max_size=80))
def test_no_text_passes_that_is_unsafe_in_a_path_or_label(text: str) -> None:
    try:
        check_task_id(text)
    except TaskIdInvalidError:
        return
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    assert 1 <= len(text) <= 63
    assert text not in (".", "..")
