"""The runner of others' programs: environments with versions that are written down, and nothing skipped in silence."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from benchmarks.environments import UnavailableError

from conformance import __main__ as runner
from conformance import environments
from conformance.checks import ConformanceError, Served
from conformance.environments import HERE

SERVED = Served("grpc", "http", "base", ["task"], Path())


@pytest.mark.parametrize("path", sorted((HERE / "requirements").iterdir()), ids=lambda path: path.stem)
def test_every_version_is_written_down(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", line)] == []


@pytest.mark.slow
def test_packages_that_cannot_be_fetched_are_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):  # an environment that was half made is not taken for a whole one
        with pytest.raises(UnavailableError, match="lm-eval: its packages cannot be installed"):
            environments.python_of("lm-eval")


def run(monkeypatch: pytest.MonkeyPatch, *found: str | Exception) -> int:
    """The runner's exit code, on checks that find these."""

    def check(each: str | Exception) -> str:
        if isinstance(each, Exception):
            raise each
        return each

    @contextmanager
    def served(model: str, root: Path) -> Iterator[Served]:
        yield SERVED

    checks = {f"suite{index}": lambda _, each=each: check(each) for index, each in enumerate(found)}
    monkeypatch.setattr(runner, "CHECKS", checks)
    monkeypatch.setattr(runner, "served_examples", served)
    monkeypatch.setattr(sys, "argv", ["conformance"])
    return runner.main()


def test_a_suite_that_is_skipped_is_named_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "fine", UnavailableError("no index")) == 0
    said = capsys.readouterr()
    assert "suite0: fine" in said.out
    assert "suite1: SKIPPED: no index" in said.out
    assert said.err.splitlines()[-1].endswith("not known to conform: suite1")


def test_a_suite_that_fails_fails_all_after_the_others_have_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, ConformanceError("differs"), "fine") == 1
    said = capsys.readouterr()
    assert "suite0: FAILED: differs" in said.out
    assert "suite1: fine" in said.out
