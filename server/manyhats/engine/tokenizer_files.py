"""What the files beside a model say of its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

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
"""Names of the files that decide how a model reads and writes text, in its directory."""

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerParts:
    """What a tokenizer is made of.

    Attributes:
        backend: neither truncates nor pads.
        special_tokens: name such as ``eos_token`` → literal.
        chat_template: Jinja source; None if the files have none.
    """

    backend: Backend
    special_tokens: Mapping[str, str]
    chat_template: str | None


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


def read_tokenizer(files: Mapping[str, bytes], origin: str) -> TokenizerParts:
    """What ``files`` make together.

    Args:
        files: name, one of ``TEXT_FILES``, → content.
        origin: what errors call the place they are from.

    Raises:
        ModelError: there is no ``tokenizer.json``, or one of the files cannot be read.
    """
    config = read_object(files, TOKENIZER_CONFIG_FILE, origin)
    backend = _read_backend(files, origin)
    special_tokens = _special_tokens(config)
    _mark_special(backend, special_tokens.values())
    return TokenizerParts(backend, special_tokens, read_chat_template(files, config, origin))


def read_object(files: Mapping[str, bytes], name: str, origin: str) -> Mapping[str, Any]:
    """The JSON object in the file of that name; empty where there is none.

    Raises:
        ModelError: the file holds anything else.
    """
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except ValueError as error:
        raise ModelError(f"{origin}/{name}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{origin}/{name}: not a JSON object")
    return content


def read_chat_template(files: Mapping[str, bytes], config: Mapping[str, Any], origin: str) -> str | None:
    """The default template: a file of its own, or in the config as a string or a list of named ones.

    Args:
        files: name, one of ``TEXT_FILES``, → content.
        config: what ``tokenizer_config.json`` holds.
        origin: what errors call the place they are from.

    Raises:
        ModelError: the file is not UTF-8.
    """
    if TEMPLATE_FILE in files:
        try:
            return files[TEMPLATE_FILE].decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{origin}/{TEMPLATE_FILE}: not UTF-8: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_backend(files: Mapping[str, bytes], origin: str) -> Backend:
    if TOKENIZER_FILE not in files:
        raise ModelError(
            f"{origin}: has no {TOKENIZER_FILE}; save the tokenizer with transformers to get one"
        )
    try:
        backend = Backend.from_buffer(files[TOKENIZER_FILE])
    except Exception as error:  # the library raises plain Exception for anything malformed
        raise ModelError(f"{origin}/{TOKENIZER_FILE}: not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; the file has each as a string or as an object with ``content``."""
    literals = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        literal = value.get("content") if isinstance(value, dict) else value
        if isinstance(literal, str) and literal:
            literals[name] = literal
    return literals


def _mark_special(backend: Backend, literals: Iterable[str]) -> None:
    """Make the named special tokens special to the backend, so that decoding skips them; flags are kept."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for literal in literals:
        token = added.get(literal) or AddedToken(literal, special=True)
        token.special = True
        backend.add_special_tokens([token])
