"""Text to token ids and back, with the checkpoint's own fast tokenizer.

The ``tokenizers`` library is used directly: importing transformers' tokenizers takes seconds. ``tokenizer_parts`` reads
a checkpoint's files as they do; tests compare. Which special tokens a text gets is up to the file's post-processor;
like transformers, we then ignore ``add_bos_token``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.text.chat_template import ChatMessage, Rendering, render_chat
from manyhats.engine.text.decoder_chain import clean_up_spaces
from manyhats.engine.text.detokenizer import Detokenizer, exact_stream, pieces_for
from manyhats.engine.text.prompt_text import (
    PromptText,
    followed_by,
    head_of,
    is_byte_level,
    special_tokens_ahead,
)
from manyhats.engine.text.special_tokens import added_flags, flags_of
from manyhats.engine.text.token_bound import TokenBound, extended_bound, token_bound
from manyhats.engine.text.tokenizer_files import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    read_text_files,
    single_steps,
)
from manyhats.engine.text.tokenizer_parts import read_tokenizer
from manyhats.engine.text.truncation import kept
from manyhats.engine.text.vocabulary import bytes_of_token

__all__ = ["ChatMessage", "TokenSpan", "Tokenizer"]

_AS_PROMPT = Rendering()


class TokenSpan(NamedTuple):
    """What a token stands for in its text.

    Attributes:
        start, end: its characters, [start, end); none of a special token.
        word: which of the words that the tokenizer splits texts into it belongs to; None of a special token.
    """

    start: int
    end: int
    word: int | None


@dataclass(frozen=True, slots=True)
class ReadText:
    """A text's tokens, and the types of those of a pair; empty if all are 0."""

    token_ids: tuple[int, ...]
    token_types: tuple[int, ...] = ()


class Tokenizer:
    """The tokenizer of one checkpoint; thread-safe.

    Args:
        backend: must not truncate or pad.
        special_tokens: name such as ``eos_token`` → literal.
        chat_template: Jinja source; None if the model has none.
        cleans_up_spaces: whether text loses the spaces before punctuation, see ``clean_up_spaces``.
        base: the tokenizer whose vocabulary this one shares, if it was made from another.
        files: what it was read from, if it was.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
        cleans_up_spaces: bool = False,
        base: Tokenizer | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self._backend = backend
        self._cleans_up_spaces = cleans_up_spaces
        self._special_tokens = dict(special_tokens)
        self._pieces = pieces_for(backend, cleans_up_spaces=cleans_up_spaces)
        self._literal_pieces = pieces_for(
            backend, skip_special_tokens=False, cleans_up_spaces=cleans_up_spaces
        )
        self._is_byte_level = is_byte_level(backend)
        self._ahead = special_tokens_ahead(backend)
        self._base = base
        self._files = files
        self.chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory.

        Raises:
            ModelError: there is no ``tokenizer.json``, or one of its files cannot be read.
        """
        return cls.from_files(read_text_files(directory), str(directory))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], origin: str) -> Tokenizer:
        """The tokenizer of the files that a Hugging Face directory would hold.

        Args:
            files: name, one of ``tokenizer_files.TEXT_FILES``, → content.
            origin: what errors call the place they come from.

        Raises:
            ModelError: there is no ``tokenizer.json``, or one of the files cannot be read.
        """
        read = read_tokenizer(files, origin)
        return cls(
            read.backend,
            special_tokens=read.special_tokens,
            chat_template=read.chat_template,
            cleans_up_spaces=read.cleans_up_spaces,
            files=files,
        )

    def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text; literals of special tokens in it become those tokens.

        The interpreter lock is released meanwhile.

        Args:
            text: any.
            add_special_tokens: whether the post-processor adds its own.
            max_tokens: how many the caller accepts.

        Raises:
            PromptTooLongError: ``text``: there are more; not tokenized if its length already shows that.
        """
        return list(self.read(text, add_special_tokens=add_special_tokens, max_tokens=max_tokens).token_ids)

    def read(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        max_tokens: int | None = None,
        first: str | None = None,
        truncates: bool = False,
    ) -> ReadText:
        """The tokens of ``encode`` with their types.

        Args:
            text, add_special_tokens, max_tokens: as for ``encode``.
            first: a text before it; the post-processor then joins the two as a pair. None for none.
            truncates: whether a longer text is cut to ``max_tokens``, special tokens apart.

        Raises:
            PromptTooLongError: as ``encode``; or special tokens alone are too many.
        """
        if max_tokens is not None and not truncates:
            self.check_length(text, max_tokens)
        # Unlike ``encode``, this releases the interpreter lock, and leaves out the tokens' offsets in the text.
        if first is None:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        else:  # without a post-processor, the fast one gives no types
            (encoding,) = self._backend.encode_batch([(first, text)], add_special_tokens=add_special_tokens)
        if max_tokens is not None and len(encoding) > max_tokens:
            if not truncates:
                raise PromptTooLongError("text", len(encoding), max_tokens)
            parts = kept(encoding, max_tokens)
        else:
            parts = [slice(None)]
        token_ids = _joined(encoding.ids, parts)
        return ReadText(token_ids, () if first is None else _joined(encoding.type_ids, parts))

    def spans(self, text: str, *, add_special_tokens: bool, max_tokens: int) -> list[TokenSpan]:
        """What each token of ``encode`` stands for in the text, which is cut to ``max_tokens`` if it has more."""
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        spans = [
            TokenSpan(start, end, word)
            for (start, end), word in zip(encoding.offsets, encoding.word_ids, strict=True)
        ]
        parts = [slice(None)] if len(spans) <= max_tokens else kept(encoding, max_tokens)
        return [span for part in parts for span in spans[part]]

    def check_length(self, text: str, max_tokens: int) -> None:
        """Refuse a text whose length already shows that it has too many tokens.

        Raises:
            PromptTooLongError: ``text``: it has more than ``max_tokens``.
        """
        # In this few bytes no bound finds too many.
        if 4 * len(text) <= max_tokens or self._bound is None:
            return
        least = self._bound.min_tokens(text)
        if least > max_tokens:
            raise PromptTooLongError("text", least, max_tokens, at_least=True)

    @cached_property
    def _bound(self) -> TokenBound | None:
        if self._base is not None:
            return None if self._base._bound is None else extended_bound(self._base._bound, self._backend)
        return token_bound(self._backend)

    def prompt(
        self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> PromptText:
        """A text that is to be continued.

        The special tokens that belong before it come only once: a text that was rendered beforehand has them. Those
        that belong after it, such as an EOS, are left out: they end what follows.

        Raises:
            PromptTooLongError: ``text``: it has more than ``max_tokens``, as ``encode`` tells.
        """
        own = self.encode(text, add_special_tokens=False, max_tokens=max_tokens)
        ahead = self._ahead if add_special_tokens else ()
        head = head_of(own, ahead)
        if max_tokens is not None and len(head) + len(own) > max_tokens:
            raise PromptTooLongError("text", len(head) + len(own), max_tokens)
        return PromptText(
            self._backend,
            text,
            head,
            own,
            is_byte_level=self._is_byte_level,
            begins_itself=len(head) < len(ahead),
        )

    def followed_by(self, text: str) -> tuple[int, ...]:
        """The tokens of a text after tokens whose text is not known; see ``PromptText.followed_by``.

        Raises:
            FieldInvalidError: ``text``: it has no tokens.
        """
        return followed_by(self._backend, text, is_byte_level=self._is_byte_level)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a sequence of tokens, without the special ones."""
        text = self._backend.decode(list(ids), skip_special_tokens=True)
        return clean_up_spaces(text) if self._cleans_up_spaces else text

    def text(self, ids: Sequence[int]) -> str:
        """Text of a sequence of tokens, special ones as their literals."""
        stream = self.stream(skip_special_tokens=False)
        return "".join([*(stream.push(token_id) for token_id in ids), stream.flush()])

    def piece(self, token_id: int) -> str:
        """Text of one token on its own; parts of characters become U+FFFD, special tokens their literal."""
        return self._pieces.piece(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 of one token on its own, in which parts of characters are as they are."""
        return bytes_of_token(self._backend, token_id, is_byte_level=self._has_byte_decoder)

    def special_token_id(self, name: str) -> int | None:
        """Id of the special token of that name, such as ``eos_token``; None if there is none."""
        literal = self._special_tokens.get(name)
        return None if literal is None else self._backend.token_to_id(literal)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Name, such as ``eos_token`` → literal."""
        return self._special_tokens

    def token_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary has it; None if it is not one."""
        return self._backend.token_to_id(token)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Id of the end-of-sequence token, if it has one."""
        token_id = self.special_token_id("eos_token")
        return frozenset() if token_id is None else frozenset({token_id})

    @property
    def has_own_template(self) -> bool:
        """Whether it was made from another tokenizer, and has another chat template."""
        return self._base is not None and self.chat_template != self._base.chat_template

    def files(self) -> Mapping[str, bytes]:
        """Text files that make this tokenizer, without its chat template if it was not read from files."""
        if self._files is not None:
            return self._files
        return {
            TOKENIZER_FILE: self.to_json().encode(),
            TOKENIZER_CONFIG_FILE: json.dumps(self._special_tokens).encode(),
        }

    def to_json(self) -> str:
        """The content of a ``tokenizer.json`` that makes this tokenizer."""
        return self._backend.to_str()

    @cached_property
    def added_tokens_digest(self) -> str:
        """Equal for tokenizers of one vocabulary that have the same added tokens, and so the same tokens."""
        return hashlib.sha256(json.dumps(added_flags(self._backend)).encode()).hexdigest()

    @cached_property
    def _has_byte_decoder(self) -> bool:
        return any(step["type"] == "ByteLevel" for step in single_steps(self._backend.decoder))

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers of one vocabulary that read and write texts and conversations the same way."""
        template = self.chat_template
        used = {
            name: literal
            for name, literal in self._special_tokens.items()
            if name == "eos_token" or name in (template or "")
        }
        splits = self._backend.encode_special_tokens
        meaning = [added_flags(self._backend), sorted(used.items()), template, self._cleans_up_spaces, splits]
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()

    def with_text(
        self,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        added_tokens: Sequence[AddedToken] | None = None,
        cleans_up_spaces: bool | None = None,
        splits_special_tokens: bool = False,
    ) -> Tokenizer:
        """A tokenizer that shares this one's vocabulary, with other text settings; None keeps the present ones.

        Args:
            chat_template: Jinja source.
            special_tokens: name → literal.
            added_tokens: all of them, in the order of their ids.
            cleans_up_spaces: as in the constructor.
            splits_special_tokens: whether literals of special tokens in a text are ordinary text.
        """
        backend = self._backend
        if added_tokens is not None and not self._has_tokens(added_tokens, splits_special_tokens):
            backend = Backend(self._backend.model)
            for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
                if (step := getattr(self._backend, name)) is not None:
                    setattr(backend, name, step)
            backend.encode_special_tokens = splits_special_tokens
            backend.add_tokens(list(added_tokens))
        return Tokenizer(
            backend,
            special_tokens=self._special_tokens if special_tokens is None else special_tokens,
            chat_template=self.chat_template if chat_template is None else chat_template,
            cleans_up_spaces=self._cleans_up_spaces if cleans_up_spaces is None else cleans_up_spaces,
            base=self,
        )

    def _has_tokens(self, added_tokens: Sequence[AddedToken], splits_special_tokens: bool) -> bool:
        own = [flags for _, flags in added_flags(self._backend)]
        is_same = own == [flags_of(token) for token in added_tokens]
        return is_same and self._backend.encode_special_tokens == splits_special_tokens

    def chat_prompt(
        self,
        messages: Sequence[ChatMessage],
        template: str | None = None,
        *,
        rendering: Rendering = _AS_PROMPT,
        max_tokens: int | None = None,
    ) -> PromptText:
        """A conversation, by default up to where the assistant's next turn begins.

        Args:
            messages: at least one.
            template: Jinja source, instead of the model's own.
            rendering: what the template gets besides, and how the text ends.
            max_tokens: as in ``encode``.

        Raises:
            FieldInvalidError: as ``chat_template.render_chat``; or there is no template.
            PromptTooLongError: as in ``encode``.
        """
        text = self.render_chat(messages, template, rendering=rendering)
        # The template writes the special tokens itself.
        return self.prompt(text, add_special_tokens=False, max_tokens=max_tokens)

    def render_chat(
        self,
        messages: Sequence[ChatMessage | Mapping[str, Any]],
        template: str | None = None,
        *,
        rendering: Rendering = _AS_PROMPT,
        now: datetime | None = None,
    ) -> str:
        """The text of a conversation; see ``chat_template.render_chat``.

        Raises:
            FieldInvalidError: as ``chat_template.render_chat``; or there is no template.
        """
        source = self.chat_template if template is None else template
        if source is None:
            raise FieldInvalidError("chat", "the model has no chat template; send text or token_ids")
        return render_chat(source, messages, self._special_tokens, rendering, now=now)

    def encode_chat(
        self, messages: Sequence[ChatMessage], template: str | None = None, *, max_tokens: int | None = None
    ) -> list[int]:
        """The token ids of ``chat_prompt``."""
        return list(self.chat_prompt(messages, template, max_tokens=max_tokens).token_ids)

    def stream(self, *, skip_special_tokens: bool = True, is_exact: bool = False) -> Detokenizer:
        """A detokenizer at the beginning of a sequence.

        Args:
            skip_special_tokens: whether special tokens have no text, or their literals.
            is_exact: whether to keep the spaces that the text would otherwise lose, before punctuation or at its
                beginning.
        """
        pieces = self._pieces if skip_special_tokens else self._literal_pieces
        return exact_stream(pieces) if is_exact else pieces.stream()


def _joined(values: Sequence[int], parts: Sequence[slice]) -> tuple[int, ...]:
    return tuple(value for part in parts for value in values[part])
