"""A model's files that determine how it reads and writes text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhats.engine.errors import ModelError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
MODEL_CONFIG_FILE = "config.json"

TEXT_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    TEMPLATE_FILE,
    MODEL_CONFIG_FILE,
)
"""Names, in a model's directory, of the files that determine how it reads and writes text."""


_STEPS = ("normalizers", "pretokenizers", "processors", "decoders")

# JSON may contain half of a surrogate pair, as an escape or in bytes.
_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Text files, parsed; each is empty if missing, except ``tokenizer.json``.

    Attributes:
        origin: what errors call the place they come from.
        tokenizer_json: ``tokenizer.json`` as it is.
        tokenizer: the same, parsed.
        config: ``tokenizer_config.json``.
        special_tokens: ``special_tokens_map.json``.
        added_tokens: ``added_tokens.json``.
        model_config: ``config.json``, of the model.
        chat_template: Jinja source of the default one; None if there is none.
    """

    origin: str
    tokenizer_json: bytes
    tokenizer: Mapping[str, Any]
    config: Mapping[str, Any]
    special_tokens: Mapping[str, Any]
    added_tokens: Mapping[str, Any]
    model_config: Mapping[str, Any]
    chat_template: str | None

    def error(self, name: str, message: str) -> ModelError:
        """An error that names a file."""
        return ModelError(f"{self.origin}/{name}: {message}")


def read_text_files(directory: Path) -> dict[str, bytes]:
    """The text files of a Hugging Face directory by name: those of ``TEXT_FILES`` that are there.

    Raises:
        ModelError: one of them cannot be read.
    """
    files = {}
    for name in TEXT_FILES:
        path = directory / name
        try:
            files[name] = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror or error}") from error
    return files


def parse_files(files: Mapping[str, bytes], origin: str) -> TokenizerFiles:
    """Parse text files.

    Args:
        files: name, one of ``TEXT_FILES``, → content.
        origin: what errors call the place they come from.

    Raises:
        ModelError: there is no ``tokenizer.json``, or one of the files is not a JSON object, or the chat template's
            not UTF-8.
    """
    if TOKENIZER_FILE not in files:
        raise ModelError(
            f"{origin}: has no {TOKENIZER_FILE}; save the tokenizer with transformers to get one"
        )
    tokenizer = _read_object(files, TOKENIZER_FILE, origin)
    config = _read_object(files, TOKENIZER_CONFIG_FILE, origin)
    return TokenizerFiles(
        origin=origin,
        tokenizer_json=files[TOKENIZER_FILE],
        tokenizer=tokenizer,
        config=config,
        special_tokens=_read_object(files, SPECIAL_TOKENS_FILE, origin),
        added_tokens=_read_object(files, ADDED_TOKENS_FILE, origin),
        model_config=_read_object(files, MODEL_CONFIG_FILE, origin),
        chat_template=_chat_template(files, config, origin),
    )


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any], origin: str) -> str | None:
    """The default chat template: a file of its own, or in ``tokenizer_config.json``, alone or among named ones."""
    if TEMPLATE_FILE in files:
        try:
            return files[TEMPLATE_FILE].decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{origin}/{TEMPLATE_FILE}: not UTF-8: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def steps_of(description: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The members of a sequence of normalizers, pre-tokenizers, post-processors or decoders; None for a single one.

    Args:
        description: as ``tokenizer.json`` has it.
    """
    if description.get("type") != "Sequence":
        return None
    return next((description[name] for name in _STEPS if name in description), None)


def single_steps(component: Any) -> list[Mapping[str, Any]]:
    """The descriptions of a backend's normalizer, pre-tokenizer or decoder, with sequences flattened."""
    pending = [] if component is None else [json.loads(component.__getstate__())]
    single = []
    while pending:
        description = pending.pop(0)
        steps = steps_of(description)
        if steps is None:
            single.append(description)
        else:
            pending[:0] = steps
    return single


def _read_object(files: Mapping[str, bytes], name: str, origin: str) -> Mapping[str, Any]:
    """The JSON object in the file of that name; empty if there is none."""
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{origin}/{name}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{origin}/{name}: not a JSON object")
    if _MAYBE_SURROGATE.search(files[name]):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(error.object[error.start]):04X}"
            raise ModelError(
                f"{origin}/{name}: has {half}, half of a surrogate pair, which is not a character"
            ) from None
    return content
