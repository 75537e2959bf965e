"""The files of an artifact that say how its task reads and writes text: chat template, tokenizer, added tokens.

They are optional, and kept with the artifact if present. What they mean, only the base's tokenizer can tell: whoever
describes a base may supply a ``TextCheck``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from manyhats.adapters.disk.files import SourceDirectory
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.formats.json_reader import parse_json_object
from manyhats.adapters.sites import TextCheck, TextFacts

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

_MIB = 1024 * 1024
_MAX_DEPTH = 32

MAX_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "added_tokens.json": 4 * _MIB,
        TEMPLATE_FILE: 1 * _MIB,
        "special_tokens_map.json": 4 * _MIB,
        TOKENIZER_FILE: 64 * _MIB,
        TOKENIZER_CONFIG_FILE: 16 * _MIB,
    }
)
"""The text files by name → how large each may be."""


def text_names(names: Collection[str]) -> tuple[str, ...]:
    """The text files among ``names``, sorted."""
    return tuple(name for name in MAX_BYTES if name in names)


def text_of(files: Mapping[str, bytes | bytearray]) -> dict[str, bytes | bytearray]:
    """The text files among an artifact's."""
    return {name: files[name] for name in text_names(files)}


def read_text(directory: SourceDirectory, max_bytes: int) -> dict[str, bytearray]:
    """The text files of a directory.

    Args:
        directory: of an artifact.
        max_bytes: of all of them together.

    Raises:
        AdapterError: one is not a regular file, is over a limit, or cannot be read.
    """
    files = {}
    for name in text_names(directory.names()):
        with directory.open_file(name, min(MAX_BYTES[name], max_bytes)) as file:
            files[name] = file.read()
        max_bytes -= len(files[name])
    return files


def check_text(files: Mapping[str, bytes | bytearray], check: TextCheck | None) -> TextFacts:
    """What the text files among an artifact's mean; without ``check`` only their form is checked.

    Raises:
        ArtifactError: they cannot be used; ``subject`` is the file.
    """
    text = text_of(files)
    if not text:
        return TextFacts()
    _check_form(text)
    return TextFacts() if check is None else check(text)


def decode_template(content: bytes | bytearray) -> str:
    """The Jinja source in ``TEMPLATE_FILE``.

    Raises:
        AdapterInvalidError: it is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise AdapterInvalidError(TEMPLATE_FILE, f"is not UTF-8 at byte {error.start}") from None


def _check_form(files: Mapping[str, bytes | bytearray]) -> None:
    for name, content in files.items():
        if name == TEMPLATE_FILE:
            decode_template(content)
        elif name != TOKENIZER_FILE:  # which is large, and read by its own library
            parse_json_object(bytes(content), name, max_bytes=MAX_BYTES[name], max_depth=_MAX_DEPTH)


def check_rows(text: TextFacts, vocab_size: int) -> None:
    """Check that each token that a tokenizer adds has a row in the task's embedding.

    Args:
        text: what the tokenizer's files mean.
        vocab_size: the number of the task's tokens: the base's, or the adapter's own.

    Raises:
        AdapterUnsupportedError: one has none; ``subject`` is the file.
    """
    if text.num_ids > vocab_size:
        raise AdapterUnsupportedError(
            TOKENIZER_FILE,
            f"adds '{text.last_token[:100]}' with the id {text.num_ids - 1}, and embedding and head have "
            f"{vocab_size} rows; save both with the adapter, resized",
        )
