"""Which format and method an artifact has, by its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.peft import format as peft_format


def recognise(config: Mapping[str, Any]) -> AdapterMethod:
    """The method of an artifact.

    Raises:
        AdapterUnsupportedError: a method or format that is not served; names it.
        AdapterInvalidError: it is not an adapter's config.
    """
    if adapterhub_format.is_adapterhub(config):
        return adapterhub_format.recognise(config)
    return peft_format.recognise(config)


def recorded_base(config: Mapping[str, Any]) -> str:
    """What an artifact names as its base model; empty if it names none.

    Raises:
        AdapterInvalidError: it is not a name.
    """
    key = base_name_key(config)
    name = config.get(key)
    if name is None:
        return ""
    if not isinstance(name, str) or len(name) > 1024 or not name.isprintable():
        raise AdapterInvalidError(key, "must be a name of at most 1024 printable characters")
    return name.strip()


def base_name_key(config: Mapping[str, Any]) -> str:
    """The key that ``recorded_base`` reads."""
    is_adapterhub = adapterhub_format.is_adapterhub(config)
    return adapterhub_format.BASE_NAME_KEY if is_adapterhub else peft_format.BASE_NAME_KEY


def weights_file(config: Mapping[str, Any], names: Sequence[str]) -> str:
    """The file that holds an artifact's tensors; nothing else in its directory may hold more of it.

    Args:
        config: decides the format.
        names: the directory's entries.

    Raises:
        AdapterUnsupportedError: a file would be left unused.
    """
    is_adapterhub = adapterhub_format.is_adapterhub(config)
    if is_adapterhub:
        adapterhub_format.check_companions(names)
    elif head := next((name for name in adapterhub_format.HEAD_FILES if name in names), None):
        raise AdapterUnsupportedError(head, "would not be used: it is AdapterHub's, and the adapter is not")
    files = (adapterhub_format.WEIGHTS_FILE, peft_format.WEIGHTS_FILE)
    own, other = files if is_adapterhub else reversed(files)
    if own in names and other in names:
        raise AdapterUnsupportedError(other, f"would not be used: the config is that of {own}")
    return own
