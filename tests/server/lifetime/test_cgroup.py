"""Limits of control groups, of both versions, as the system writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyhats.server.lifetime.cgroup import Cgroup, Memory

GIB = 2**30
MEMINFO = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {10 * GIB // 1024} kB\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "mount/pod/container").mkdir(parents=True)
    (tmp_path / "membership").write_text("0::/pod/container\n")
    return tmp_path


def group(machine: Path) -> Cgroup:
    return Cgroup(machine / "mount", machine / "membership", machine / "meminfo")


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text + "\n")


def test_without_limits_it_is_the_machines(machine: Path) -> None:
    write(machine / "mount/pod/container", memory__max="max", memory__current="5", cpu__max="max 100000")
    assert group(machine).memory() == Memory(16 * GIB, 10 * GIB)
    assert group(machine).processors() is None


def test_the_smallest_limit_on_the_way_up_holds(machine: Path) -> None:
    write(machine / "mount/pod/container", memory__max=str(8 * GIB), memory__current=str(GIB))
    write(
        machine / "mount/pod",
        memory__max=str(4 * GIB),
        memory__current=str(3 * GIB),
        cpu__max="250000 100000",
    )
    write(machine / "mount", cpu__max="400000 100000")
    assert group(machine).memory() == Memory(4 * GIB, GIB)
    assert group(machine).processors() == 2.5


def test_memory_that_files_take_counts_as_available(machine: Path) -> None:
    write(
        machine / "mount/pod/container",
        memory__max=str(4 * GIB),
        memory__current=str(3 * GIB),
        memory__stat=f"anon 5\ninactive_file {2 * GIB}",
    )
    assert group(machine).memory() == Memory(4 * GIB, 3 * GIB)


def test_version_1(machine: Path) -> None:
    (machine / "membership").write_text("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/docker/x\n")
    write(machine / "mount/cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(machine / "mount/cpu/docker/x", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    # As in a container that sees its own group alone.
    write(machine / "mount/memory", memory__limit_in_bytes=str(2 * GIB), memory__usage_in_bytes=str(GIB))
    assert group(machine).processors() == 0.5
    assert group(machine).memory() == Memory(2 * GIB, GIB)


def test_a_system_that_says_nothing() -> None:
    nowhere = Path("/nowhere")
    assert Cgroup(nowhere, nowhere, nowhere).memory() is None
    assert Cgroup(nowhere, nowhere, nowhere).processors() is None
