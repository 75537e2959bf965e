"""A checkpoint as its files describe it, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhats.engine.checkpoints.checkpoint import read_json, weight_files
from manyhats.engine.checkpoints.identity import FileDigests, content_digest
from manyhats.engine.checkpoints.sentence_transformers import SentenceSettings, read_sentence_settings
from manyhats.engine.model.families.reading import read_family
from manyhats.engine.model.layout import Family


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """A checkpoint's directory, parsed files, the architecture it describes, and the digest of config and weights."""

    directory: Path
    config: Mapping[str, Any]
    sentences: SentenceSettings
    family: Family
    digest: str


def find_checkpoint(directory: Path, max_context_length: int | None, digests: FileDigests) -> FoundCheckpoint:
    """Read what describes a checkpoint.

    Args:
        directory: a Hugging Face directory.
        max_context_length: None for the model's own, or what its sentence-transformers files say.
        digests: remembers those of large files.

    Raises:
        ModelError: a file is missing or cannot be read, or the model cannot be served.
    """
    config_file = directory / "config.json"
    config = read_json(config_file)
    sentences = read_sentence_settings(directory)
    family = read_family(config, max_context_length)
    if max_context_length is None and sentences.max_length is not None:
        family = read_family(config, min(sentences.max_length, family.architecture.max_context_length))
    digest = content_digest([config_file, *weight_files(directory)], digests)
    return FoundCheckpoint(directory, config, sentences, family, digest)
