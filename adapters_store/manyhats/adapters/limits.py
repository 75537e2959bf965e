"""How large an adapter may be."""

from __future__ import annotations

from dataclasses import dataclass, fields

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """Bounds that are checked before anything is allocated.

    Attributes:
        max_size_bytes: all files of one artifact together.
        max_rank: R of any low-rank delta.
        max_virtual_tokens: P of any prefix.
        max_parts: adapters in one composed task.
        max_num_tensors: tensors in one artifact.
        max_config_bytes: the JSON config file.
        max_config_depth: nesting of the JSON config.
        max_header_bytes: the JSON header of a safetensors file.

    Raises:
        ValueError: a limit is below 1.
    """

    max_size_bytes: int = 1024 * _MIB
    max_rank: int = 256
    max_virtual_tokens: int = 4096
    max_parts: int = 16
    max_num_tensors: int = 16_384
    max_config_bytes: int = 1 * _MIB
    max_config_depth: int = 16
    max_header_bytes: int = 8 * _MIB

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) < 1:
                raise ValueError(f"{limit.name} must be at least 1")
