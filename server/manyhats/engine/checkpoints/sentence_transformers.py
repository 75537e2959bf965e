"""What a sentence-transformers directory says of how texts become vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhats.adapters.heads import Pooling
from manyhats.engine.checkpoints.checkpoint import read_json
from manyhats.engine.errors import ModelError

MODULES_FILE = "modules.json"
SETTINGS_FILE = "sentence_bert_config.json"

_POOLINGS = {
    "pooling_mode_cls_token": Pooling.FIRST,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_lasttoken": Pooling.LAST,
}
# Whether vectors are normalized is for the caller to say.
_SERVED = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class SentenceSettings:
    """How one directory's texts become vectors; None where it does not say.

    Attributes:
        max_length: tokens of the longest text, at most; it may be below what the model has positions for.
    """

    pooling: Pooling | None = None
    max_length: int | None = None


def read_sentence_settings(directory: Path) -> SentenceSettings:
    """The settings of a model's directory; none of a directory that is not of sentence-transformers.

    Raises:
        ModelError: a file cannot be read, or names a module or a pooling that is not served.
    """
    if not (directory / MODULES_FILE).is_file():
        return SentenceSettings()
    pooling = None
    for kind, path in _modules(directory / MODULES_FILE):
        if kind not in _SERVED:
            raise ModelError(f"{MODULES_FILE}: {kind} is not served; {', '.join(_SERVED)} are")
        if kind == "Pooling":
            pooling = _pooling(read_json(directory / path / "config.json"), path)
    return SentenceSettings(pooling, _max_length(directory / SETTINGS_FILE))


def _modules(file: Path) -> list[tuple[str, str]]:
    """The last part of each module's type, and its folder."""
    try:
        modules = json.loads(file.read_bytes())
        return [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in modules]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: is no list of modules, each with its type and path") from error


def _pooling(config: Mapping[str, Any], folder: str) -> Pooling:
    chosen = [name for name, is_on in config.items() if name.startswith("pooling_mode_") and is_on is True]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        asked, served = ", ".join(chosen) or "no pooling", ", ".join(_POOLINGS)
        raise ModelError(f"{folder}/config.json: {asked} is not served; one of these is: {served}")
    return _POOLINGS[chosen[0]]


def _max_length(file: Path) -> int | None:
    settings = read_json(file) if file.is_file() else {}
    if settings.get("do_lower_case"):
        raise ModelError(
            f"{SETTINGS_FILE}: do_lower_case asks for texts in small letters, whatever the tokenizer does; set it to "
            "false if the tokenizer lowers them itself"
        )
    length = settings.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise ModelError(
            f"{SETTINGS_FILE}: max_seq_length must be a whole number of at least 1, not {length!r}"
        )
    return length
