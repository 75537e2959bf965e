"""How large an adapter may be, and how much of all there may be."""

from __future__ import annotations

from dataclasses import dataclass, fields

from manyhats.settings.declaration import setting

STORE_BOUNDS = "What the store accepts"
"""The title under which the settings of what may be registered are shown."""

_MIB = 1024 * 1024

DEFAULT_CACHE_BYTES = 8 * 1024 * _MIB
"""The size limit of local copies from a store at a URL."""

MAX_ADDED_TOKENS = 65536
"""How many tokens a task may have beyond the base's."""

_NONE = "no limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """Bounds that are checked before anything is allocated.

    Attributes:
        max_num_tensors: tensors in one artifact.
        max_config_bytes: the JSON config file.
        max_config_depth: nesting of the JSON config.
        max_header_bytes: the JSON header of a safetensors file.

    Raises:
        ValueError: a limit is below 1.
    """

    max_size_bytes: int = setting(
        1024 * _MIB,
        name="max_artifact_bytes",
        unit="bytes",
        at_least=1,
        group=STORE_BOUNDS,
        help="Size of all files of one adapter.",
    )
    max_rank: int = setting(
        256,
        name="max_adapter_rank",
        metavar="R",
        at_least=1,
        group=STORE_BOUNDS,
        help="Rank of a low-rank delta.",
    )
    max_virtual_tokens: int = setting(
        4096, metavar="P", at_least=1, group=STORE_BOUNDS, help="Virtual tokens of a prefix or a soft prompt."
    )
    max_parts: int = setting(16, at_least=1, group=STORE_BOUNDS, help="Adapters in a composed task.")
    max_num_tensors: int = 16_384
    max_config_bytes: int = 1 * _MIB
    max_config_depth: int = 16
    max_header_bytes: int = 8 * _MIB

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) < 1:
                raise ValueError(f"{limit.name} must be at least 1")


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
