"""How much the store takes, per task and in total."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """Bounds on what is registered and on transfers in progress; None means no bound.

    Bytes are counted per version, though versions that share an artifact share its bytes.

    Attributes:
        max_tasks: tasks that have a version.
        max_versions_per_task: versions of one task at a time.
        max_bytes_per_task: of all versions of one task.
        max_bytes: of all versions of all tasks.
        max_transfers: uploads, and downloads of sources, in progress in one process; always bounded, since each takes
            disk space.

    Raises:
        ValueError: a quota is below 1.
    """

    max_tasks: int | None = None
    max_versions_per_task: int | None = None
    max_bytes_per_task: int | None = None
    max_bytes: int | None = None
    max_transfers: int = 16

    def __post_init__(self) -> None:
        for quota in fields(self):
            value = getattr(self, quota.name)
            if value is not None and value < 1:
                raise ValueError(f"{quota.name} must be at least 1")
