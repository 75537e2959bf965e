"""YAML files of settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def read_yaml(file: Path, flag: str, error: Callable[[str, str], Exception]) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file.

    Args:
        file: read as UTF-8.
        flag: the one that named it.
        error: made from a flag and what is wrong.

    Raises:
        ``error``: it cannot be read, is not a mapping, or has a duplicate key.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as cause:
        raise error(flag, f"cannot read {file}: {cause.strerror}") from cause
    except _TwiceError as cause:
        raise error(flag, f"{file}:{cause.line}: {cause.key}: is given twice") from cause
    except (UnicodeDecodeError, yaml.YAMLError) as cause:
        raise error(flag, f"{file} is not YAML: {cause}") from cause
    except ValueError as cause:
        raise error(flag, f"{file} has a number with too many digits, or an invalid date") from cause
    except RecursionError as cause:
        raise error(flag, f"{file} is nested too deeply") from cause
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise error(flag, f"{file} must have settings, one 'name: value' each")
    return content


class _TwiceError(Exception):
    """A mapping has a key twice; ``line`` is the second one's, from 1."""

    def __init__(self, key: str, line: int) -> None:
        super().__init__(key, line)
        self.key = key
        self.line = line


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, of which the last would count."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """See ``yaml.composer``; what ``<<`` merges in is not yet among the mapping's own keys."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _TwiceError(key.value, key.start_mark.line + 1)
                seen.add(key.value)
        return node
