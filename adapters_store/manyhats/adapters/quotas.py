"""How much the store may hold, per task and in total."""

from __future__ import annotations

from dataclasses import dataclass, fields

from manyhats.adapters.limits import STORE_BOUNDS
from manyhats.settings.declaration import setting

_NONE = "no limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """Limits on what is registered and on transfers in progress; None for no limit.

    Bytes are counted per version, though versions that share an artifact share its bytes. Transfers are always limited,
    since each takes disk space.

    Raises:
        ValueError: a quota is below 1.
    """

    max_tasks: int | None = setting(
        None, at_least=1, group=STORE_BOUNDS, shown=_NONE, help="Tasks that the store may hold."
    )
    max_versions_per_task: int | None = setting(
        None, at_least=1, group=STORE_BOUNDS, shown=_NONE, help="Versions of a task at a time."
    )
    max_bytes_per_task: int | None = setting(
        None,
        unit="bytes",
        at_least=1,
        group=STORE_BOUNDS,
        shown=_NONE,
        help="Size of all versions of a task together.",
    )
    max_bytes: int | None = setting(
        None,
        unit="bytes",
        at_least=1,
        group=STORE_BOUNDS,
        shown=_NONE,
        help="Size of all versions of all tasks together.",
    )
    max_transfers: int = setting(
        16, at_least=1, group=STORE_BOUNDS, help="Uploads, and downloads of adapters, at a time."
    )

    def __post_init__(self) -> None:
        for quota in fields(self):
            value = getattr(self, quota.name)
            if value is not None and value < 1:
                raise ValueError(f"{quota.name} must be at least 1")
