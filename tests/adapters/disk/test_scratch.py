from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manyhats.adapters.disk.scratch import Scratch
from manyhats.adapters.errors import QuotaExceededError, StoreUnavailableError


def test_a_directory_is_private_and_goes_with_its_owner(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "scratch", 1)
    with scratch.directory() as directory:
        (name,) = os.listdir(tmp_path / "scratch")
        assert (tmp_path / "scratch" / name).stat().st_mode & 0o777 == 0o700
        os.close(directory.create("file"))
    directory.close()
    assert os.listdir(tmp_path / "scratch") == []


def test_there_are_only_so_many_at_a_time(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, 2)
    first = scratch.open()
    with scratch.directory(), pytest.raises(QuotaExceededError) as caught:
        scratch.open()
    assert caught.value.subject == "max_transfers"
    first.close()
    first.close()
    with scratch.directory(), scratch.directory():
        pass


def test_a_sweep_removes_what_a_crash_left_and_spares_what_is_in_use(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib\n"
        "from manyhats.adapters.disk.scratch import Scratch\n"
        "directory = Scratch(pathlib.Path(sys.argv[1]), 1).open()\n"
        "os.write(directory.create('half'), b'bytes')\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    (tmp_path / "notes.txt").touch()
    scratch = Scratch(tmp_path, 1)
    with scratch.directory():
        assert len(os.listdir(tmp_path)) == 3
        assert Scratch(tmp_path, 1).sweep() == 1
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_temporary_scratch_removes_its_root() -> None:
    scratch = Scratch.temporary(1)
    with scratch.directory() as directory:
        root = Path(os.readlink(f"/proc/self/fd/{directory.descriptor}")).parent
        assert root.exists()
    scratch.close()
    assert not root.exists()


def test_a_root_that_cannot_be_made_is_the_stores_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailableError) as caught:
        Scratch(tmp_path / "file" / "scratch", 1)
    assert str(tmp_path) not in str(caught.value)
