"""The process that compiles the token-choosing kernel ahead: it ends with its parent, and is not begun in vain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manyhats.engine.backends.cpu.choosing import ahead
from manyhats.engine.backends.cpu.choosing.ahead import choosing_compiled_ahead
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.warmup import every_filter
from manyhats.engine.progress import LatestProgress

COMMAND = [sys.executable, "-m", "manyhats.engine.backends.cpu.choosing.ahead"]


@pytest.fixture
def _compiled() -> None:
    HostLogits(torch.zeros(1, 64), CpuKernels(1)).finish(every_filter())


@pytest.mark.usefixtures("_compiled")
def test_with_the_kernel_on_disk_it_ends_well_and_is_not_begun_again() -> None:
    child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE)
    with child:
        assert child.wait(timeout=120) == 0
    with choosing_compiled_ahead(lambda: pytest.fail("nothing is to be waited for")) as wait:
        wait()


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    environment = {**os.environ, "MANYHATS_HOME": str(tmp_path)}
    result = subprocess.run(COMMAND, stdin=subprocess.DEVNULL, env=environment, timeout=120)
    assert result.returncode == 1


class Interrupted(Exception):  # noqa: N818
    pass


def test_waiting_is_ended_by_what_its_progress_raises_and_the_process_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead.numba_config, "CACHE_DIR", str(tmp_path))  # where nothing is compiled yet
    monkeypatch.setenv("MANYHATS_HOME", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def interrupt() -> None:
        raise Interrupted

    def use() -> None:
        with choosing_compiled_ahead(interrupt) as wait:
            wait()

    with pytest.raises(Interrupted):
        use()


def test_the_latest_progress_is_passed_on_again() -> None:
    seen: list[tuple[str, int, int]] = []
    progress = LatestProgress(lambda stage, done, total: seen.append((stage, done, total)))
    progress.again()
    assert seen == []
    progress("compile", 2, 13)
    progress.again()
    assert seen == [("compile", 2, 13), ("compile", 2, 13)]
