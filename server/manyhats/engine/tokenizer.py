"""Text to token ids and back, by the checkpoint's own fast tokenizer.

The ``tokenizers`` library is used directly: importing transformers' tokenizers takes seconds. What those make of a
checkpoint's files is read by ``tokenizer_parts``; tests compare. Which special tokens a text gets is the file's own
business: its post-processor says so, and like transformers we ignore ``add_bos_token`` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend

from manyhats.engine.chat_template import ChatMessage, render_chat
from manyhats.engine.decoder_chain import clean_up_spaces
from manyhats.engine.detokenizer import Detokenizer, pieces_for
from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.prompt_text import (
    PromptText,
    followed_by,
    head_of,
    is_byte_level,
    special_tokens_around,
)
from manyhats.engine.token_bound import TokenBound, token_bound
from manyhats.engine.tokenizer_files import read_text_files
from manyhats.engine.tokenizer_parts import read_tokenizer

__all__ = ["ChatMessage", "Tokenizer"]


class Tokenizer:
    """The tokenizer of one checkpoint; safe to use from several threads.

    Args:
        backend: must not truncate or pad.
        special_tokens: name such as ``eos_token`` → literal.
        chat_template: Jinja source; None if the model has none.
        cleans_up_spaces: whether text loses the spaces before punctuation, see ``clean_up_spaces``.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
        cleans_up_spaces: bool = False,
    ) -> None:
        self._backend = backend
        self._cleans_up_spaces = cleans_up_spaces
        self._special_tokens = dict(special_tokens)
        self._pieces = pieces_for(backend, cleans_up_spaces=cleans_up_spaces)
        self._literal_pieces = pieces_for(
            backend, skip_special_tokens=False, cleans_up_spaces=cleans_up_spaces
        )
        self._is_byte_level = is_byte_level(backend)
        self._ahead, self._behind = special_tokens_around(backend)
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
            origin: what errors call the place they are from.

        Raises:
            ModelError: there is no ``tokenizer.json``, or one of the files cannot be read.
        """
        read = read_tokenizer(files, origin)
        return cls(
            read.backend,
            special_tokens=read.special_tokens,
            chat_template=read.chat_template,
            cleans_up_spaces=read.cleans_up_spaces,
        )

    def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text; literals of special tokens in it become those tokens.

        Other threads run meanwhile.

        Args:
            text: any.
            add_special_tokens: whether the post-processor adds its own.
            max_tokens: how many the caller takes.

        Raises:
            PromptTooLongError: ``text``: there are more; not tokenized where its length already tells.
        """
        if max_tokens is not None:
            self.check_length(text, max_tokens)
        # Unlike ``encode``, this lets go of the interpreter lock, and leaves out the places of the tokens in the text.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if max_tokens is not None and len(encoding) > max_tokens:
            raise PromptTooLongError("text", len(encoding), max_tokens)
        ids: list[int] = encoding.ids
        return ids

    def check_length(self, text: str, max_tokens: int) -> None:
        """Refuse a text whose length already tells that it has too many tokens.

        Raises:
            PromptTooLongError: ``text``: it has more than ``max_tokens``.
        """
        # In so few bytes no bound finds too many.
        if 4 * len(text) <= max_tokens or self._bound is None:
            return
        least = self._bound.min_tokens(text)
        if least > max_tokens:
            raise PromptTooLongError("text", least, max_tokens, at_least=True)

    @cached_property
    def _bound(self) -> TokenBound | None:
        return token_bound(self._backend)

    def prompt(
        self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> PromptText:
        """A text that is to be continued.

        The special tokens that belong ahead of it come once: a text that was rendered beforehand has them. Those that
        belong behind it, such as an EOS, do not come: they end what follows.

        Raises:
            PromptTooLongError: ``text``: it has more than ``max_tokens``, as ``encode`` tells.
        """
        if max_tokens is not None:
            self.check_length(text, max_tokens)
        own = self.encode(text, add_special_tokens=False)
        head = head_of(own, self._ahead) if add_special_tokens else ()
        if max_tokens is not None and len(head) + len(own) > max_tokens:
            raise PromptTooLongError("text", len(head) + len(own), max_tokens)
        return PromptText(self._backend, text, head, own, is_byte_level=self._is_byte_level)

    def followed_by(self, text: str) -> tuple[int, ...]:
        """What a text becomes behind tokens whose text is not known; see ``PromptText.followed_by``.

        Raises:
            FieldInvalidError: ``text``: it has no tokens.
        """
        return followed_by(self._backend, text, is_byte_level=self._is_byte_level)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a sequence of tokens, the special ones left out."""
        text = self._backend.decode(list(ids), skip_special_tokens=True)
        return clean_up_spaces(text) if self._cleans_up_spaces else text

    def piece(self, token_id: int) -> str:
        """Text of one token by itself; parts of characters become U+FFFD, special tokens their literal."""
        return self._pieces.piece(token_id)

    def special_token_id(self, name: str) -> int | None:
        """Id of the special token of that name, such as ``eos_token``; None if there is none."""
        literal = self._special_tokens.get(name)
        return None if literal is None else self._backend.token_to_id(literal)

    def chat_prompt(
        self, messages: Sequence[ChatMessage], template: str | None = None, *, max_tokens: int | None = None
    ) -> PromptText:
        """A conversation, up to where the assistant's next turn begins.

        Args:
            messages: at least one.
            template: Jinja source, in place of the model's own.
            max_tokens: as in ``encode``.

        Raises:
            FieldInvalidError: ``chat``: there is no template or no message, or the template refuses them.
            PromptTooLongError: as in ``encode``.
        """
        source = self.chat_template if template is None else template
        if source is None:
            raise FieldInvalidError("chat", "the model has no chat template; send text or token_ids")
        # The template writes the special tokens itself.
        text = render_chat(source, messages, self._special_tokens)
        return self.prompt(text, add_special_tokens=False, max_tokens=max_tokens)

    def encode_chat(
        self, messages: Sequence[ChatMessage], template: str | None = None, *, max_tokens: int | None = None
    ) -> list[int]:
        """The token ids of ``chat_prompt``."""
        return list(self.chat_prompt(messages, template, max_tokens=max_tokens).token_ids)

    def stream(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A detokenizer at the beginning of a sequence; special tokens have no text, or their literals."""
        return (self._pieces if skip_special_tokens else self._literal_pieces).stream()
