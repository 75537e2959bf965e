"""The files that an artifact may have, and how large each may be."""

from __future__ import annotations

from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.peft import format as peft_format
from manyhats.adapters.formats.text_files import MAX_BYTES
from manyhats.adapters.limits import AdapterLimits

FILES = (
    peft_format.CONFIG_FILE,
    peft_format.WEIGHTS_FILE,
    adapterhub_format.WEIGHTS_FILE,
    *adapterhub_format.HEAD_FILES,
    *MAX_BYTES,
)
"""Their names: config, tensors in either format, AdapterHub's head, text files."""

_CONFIGS = (peft_format.CONFIG_FILE, adapterhub_format.HEAD_CONFIG_FILE)


def max_bytes_of(name: str, limits: AdapterLimits) -> int:
    """How large one of ``FILES`` may be; all of an artifact's together may have ``max_size_bytes``."""
    own = limits.max_config_bytes if name in _CONFIGS else MAX_BYTES.get(name, limits.max_size_bytes)
    return min(own, limits.max_size_bytes)
