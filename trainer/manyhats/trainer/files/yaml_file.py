"""YAML files of settings, and errors that name them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from manyhats.trainer.errors import SettingError


def read_yaml(file: Path, flag: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file's is empty.

    Args:
        file: read as UTF-8.
        flag: that named it, for the error.

    Raises:
        SettingError: it cannot be read, is not a mapping, or has a key twice in one.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise SettingError(flag, f"cannot read {file}: {error.strerror}") from error
    except _TwiceError as error:
        raise SettingError(flag, f"{file}:{error.line}: {error.key}: is given twice") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(flag, f"{file} is not YAML: {error}") from error
    except ValueError as error:
        raise SettingError(flag, f"{file} has a number of too many digits, or a date that is none") from error
    except RecursionError as error:
        raise SettingError(flag, f"{file} is nested too deeply") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingError(flag, f"{file} must hold settings, one 'name: value' each")
    return content


@contextmanager
def of_file(file: Path, flag: str, names: Collection[str] | None = None) -> Iterator[None]:
    """Errors of a file's settings name the file, and are those of the flag that named it.

    Args:
        names: of the settings that the file has; None where all are the file's.
    """
    try:
        yield
    except SettingError as error:
        if names is not None and error.setting.partition(".")[0] not in names:
            raise
        raise SettingError(flag, f"{file}: {error}") from error


class _TwiceError(Exception):
    """A mapping has a key twice; ``line`` is the second one's, from 1."""

    def __init__(self, key: str, line: int) -> None:
        super().__init__(key, line)
        self.key = key
        self.line = line


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML without a key that comes twice, of which the last would count."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """See ``yaml.composer``; what ``<<`` merges in is not among the mapping's own keys yet."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _TwiceError(key.value, key.start_mark.line + 1)
                seen.add(key.value)
        return node
