"""The comparison of two recordings: what differs is told by its key, and nothing else is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recording.differences import differences
from recording.exact import exact

SCRIPT = Path(__file__).parent.parent / "scripts" / "record_outputs.py"
WAS = {"tokens": {"base": "5 6 7", "lora": "8 9"}, "rows": [{"id": 1}, {"id": 2}]}


def test_the_same_has_no_differences() -> None:
    assert list(differences(WAS, json.loads(json.dumps(WAS)))) == []


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({**WAS, "rows": [{"id": 1}, {"id": 3}]}, ["rows/1/id: was 2, is 3"]),
        ({**WAS, "rows": [{"id": 1}]}, ["rows/1: removed; was {'id': 2}"]),
        ({**WAS, "more": True}, ["more: added: True"]),
        ({**WAS, "rows": [{"id": True}, {"id": 2}]}, ["rows/0/id: was 1, is True"]),
        ({**WAS, "tokens": "none"}, [f"tokens: was {WAS['tokens']}, is none"]),
    ],
)
def test_each_difference_is_told_by_its_key(now: dict[str, object], told: list[str]) -> None:
    assert [str(each) for each in differences(WAS, now)] == told  # type: ignore[arg-type]


def test_long_values_are_shown_where_they_part() -> None:
    (found,) = differences("0" * 500 + "1" + "2" * 500, "0" * 500 + "3" + "2" * 500, "key")
    assert "1222" in found.what
    assert "3222" in found.what
    assert len(found.what) < 300


def test_floats_that_differ_in_their_last_bit_differ() -> None:
    assert exact(0.1 + 0.2) != exact(0.3)


def compare(directory: Path, now: object, *flags: str) -> subprocess.CompletedProcess[str]:
    for name, content in (("was", WAS), ("now", now)):
        (directory / name).write_text(json.dumps(content))
    command = [sys.executable, SCRIPT, "compare", directory / "was", directory / "now", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_exit_status_tells_whether_anything_differs(tmp_path: Path) -> None:
    same = compare(tmp_path, WAS)
    assert (same.returncode, same.stdout) == (0, "")
    other = {**WAS, "tokens": {"base": "5 6 8", "lora": "8 9"}}
    changed = compare(tmp_path, other)
    assert (changed.returncode, changed.stdout) == (1, "tokens/base: was 5 6 7, is 5 6 8\n")
    assert compare(tmp_path, other, "--only", "lora").returncode == 0
