"""What the container, or whatever else bounds this process's control group, lets it have: memory and processor time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """In bytes.

    Attributes:
        total: that this process may use at most.
        available: of it, what others leave.
    """

    total: int
    available: int


class Cgroup:
    """The limits of this process's control group and those it is in, of either version; of the machine without any.

    Args:
        mount: where the groups are.
        membership: says which group this process is in.
        meminfo: the machine's memory.
    """

    def __init__(
        self,
        mount: Path = Path("/sys/fs/cgroup"),
        membership: Path = Path("/proc/self/cgroup"),
        meminfo: Path = Path("/proc/meminfo"),
    ) -> None:
        self._mount, self._membership, self._meminfo = mount, membership, meminfo

    def processors(self) -> float | None:
        """Processors whose time it may use; None if as many as it may run on."""
        quotas = [_ratio(_text(group / "cpu.max")) for group in self._groups("")]
        for group in self._groups("cpu"):
            quotas.append(_ratio(f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}"))
        return min((quota for quota in quotas if quota is not None), default=None)

    def memory(self) -> Memory | None:
        """Memory that it may use; None if the system does not say."""
        memory = self._machine()
        for controller, limit, used in (
            ("", "memory.max", "memory.current"),
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            for group in self._groups(controller):
                memory = _bounded(
                    memory, _text(group / limit), _text(group / used), _text(group / "memory.stat")
                )
        return memory

    def _machine(self) -> Memory | None:
        try:
            lines = self._meminfo.read_text().splitlines()
        except OSError:
            return None
        sizes = {
            name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)
        }
        return Memory(sizes["MemTotal"], sizes["MemAvailable"])

    def _groups(self, controller: str) -> Iterator[Path]:
        """The group and those it is in; of version 2 without a controller."""
        try:
            lines = self._membership.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                group = self._mount / controller / path.lstrip("/")
                yield group
                for above in group.parents:
                    if not above.is_relative_to(self._mount / controller):
                        break
                    yield above


def _text(file: Path) -> str:
    """Its content; empty if there is no such file, as where a limit does not exist."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _bounded(memory: Memory | None, limit: str, used: str, statistics: str) -> Memory | None:
    """Memory within a group's limit; what is used for files that nobody reads any more can be had again."""
    if memory is None or not (limit.isdigit() and used.isdigit()) or int(limit) >= memory.total:
        return memory
    counts = dict(line.split() for line in statistics.splitlines())
    spare = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    left = max(int(limit) - int(used) + spare, 0)
    return Memory(int(limit), min(memory.available, left))


def _ratio(text: str) -> float | None:
    """``150000 100000`` is one and a half; ``max`` and -1 are no limit."""
    quota, _, period = text.partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
