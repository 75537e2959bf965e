"""Text to token ids and back, by the checkpoint's own fast tokenizer.

The ``tokenizers`` library is used directly: importing transformers' tokenizers takes seconds. What those add
to a ``tokenizer.json`` (named special tokens and the chat template) is read here; a test compares. Which
special tokens a text gets is the file's own business: its post-processor says so, and like transformers we
ignore ``add_bos_token`` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from manyhats.engine.chat_template import ChatMessage, render_chat
from manyhats.engine.detokenizer import Detokenizer, pieces_for
from manyhats.engine.errors import FieldInvalidError, ModelError

__all__ = ["ChatMessage", "Tokenizer"]

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """The tokenizer of one checkpoint; safe to use from several threads.

    Args:
        backend: must not truncate or pad.
        special_tokens: name such as ``eos_token`` → literal.
        chat_template: Jinja source; None if the model has none.
    """

    def __init__(
        self, backend: Backend, *, special_tokens: Mapping[str, str], chat_template: str | None = None
    ) -> None:
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._pieces = pieces_for(backend)
        self.chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory.

        Raises:
            ModelError: there is no ``tokenizer.json``, or it or its config cannot be read.
        """
        config = _read_config(directory / CONFIG_FILE)
        backend = _read_backend(directory / TOKENIZER_FILE)
        special_tokens = _special_tokens(config)
        _mark_special(backend, special_tokens.values())
        return cls(backend, special_tokens=special_tokens, chat_template=_chat_template(directory, config))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; literals of special tokens in it become those tokens."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a sequence of tokens, the special ones left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """Text of one token by itself; parts of characters become U+FFFD, special tokens their literal."""
        return self._pieces.piece(token_id)

    def special_token_id(self, name: str) -> int | None:
        """Id of the special token of that name, such as ``eos_token``; None if there is none."""
        literal = self._special_tokens.get(name)
        return None if literal is None else self._backend.token_to_id(literal)

    def encode_chat(self, messages: Sequence[ChatMessage], template: str | None = None) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next turn begins.

        Args:
            messages: at least one.
            template: Jinja source, in place of the model's own.

        Raises:
            FieldInvalidError: ``chat``: there is no template or no message, or the template refuses them.
        """
        source = self.chat_template if template is None else template
        if source is None:
            raise FieldInvalidError("chat", "the model has no chat template; send text or token_ids")
        # The template writes the special tokens itself.
        return self.encode(render_chat(source, messages, self._special_tokens), add_special_tokens=False)

    def stream(self) -> Detokenizer:
        """A detokenizer at the beginning of a sequence."""
        return self._pieces.stream()


def _read_backend(path: Path) -> Backend:
    if not path.is_file():
        raise ModelError(
            f"{path.parent}: has no {TOKENIZER_FILE}; save the tokenizer with transformers to get one"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for anything malformed
        raise ModelError(f"{path}: not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_config(path: Path) -> Mapping[str, Any]:
    """``tokenizer_config.json``; empty where there is none."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return config


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


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The default template: a file of its own, or in the config as a string or a list of named ones."""
    path = directory / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
