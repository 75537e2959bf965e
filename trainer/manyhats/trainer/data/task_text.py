"""Training from a task that has its own chat template or tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from manyhats.adapters.disk.files import open_local
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.formats.text_files import read_text
from manyhats.adapters.limits import AdapterLimits
from manyhats.engine.checkpoints.loader import GenerationDefaults, LoadedModel
from manyhats.trainer.errors import SettingError


def with_text_of(model: LoadedModel, init_from: str) -> tuple[LoadedModel, Mapping[str, bytes]]:
    """The base as an artifact's task sees it, and the artifact's text files, which the trained artifact keeps.

    Args:
        model: the base.
        init_from: the artifact's directory; empty for none.

    Raises:
        SettingError: ``init_from``: its text files cannot be used on this base.
    """
    if not init_from:
        return model, {}
    try:
        with open_local(Path(init_from).resolve()) as directory:
            files = read_text(directory, AdapterLimits().max_size_bytes)
        tokenizer = model.texts.read(files).tokenizer
    except AdapterError as error:
        raise SettingError("init_from", f"{init_from}: {error}") from error
    ends = {token_id for token_id in tokenizer.eos_token_ids if token_id < model.architecture.vocab_size}
    generation = GenerationDefaults(eos_token_ids=model.generation.eos_token_ids | ends)
    return (
        replace(model, tokenizer=tokenizer, generation=generation),
        {name: bytes(content) for name, content in files.items()},
    )
