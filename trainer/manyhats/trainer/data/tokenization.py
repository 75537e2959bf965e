"""Rows to tokens, as the server makes them of the same prompt and completion.

A prompt is tokenized as a request's text or chat is, and the completion alone, without special tokens, after it:
what the server's ``Score`` computes, and what its ``Generate`` continues. Then comes the token that ends a
generation; it is learned too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.tokenizer import ChatMessage, Tokenizer
from manyhats.trainer.data.contents import Conversation, PlainText, Prompted, contents_of
from manyhats.trainer.data.dataset import Dataset, DatasetBuilder
from manyhats.trainer.data.row import Row
from manyhats.trainer.errors import DataError
from manyhats.trainer.settings import DataSettings

_NUM_REMEMBERED = 4096  # completions of classification are few, and each comes often


def tokenize_rows(
    rows: Iterable[Row], tokenizer: Tokenizer, eos_token_id: int, settings: DataSettings, max_length: int
) -> Dataset:
    """Tokenize rows, one at a time, and keep their tokens.

    A row longer than ``max_length`` is an error, or left out, or truncated, as ``settings.overlong`` says.
    Truncation keeps what is learned: of a prompt or conversation the beginning is cut off, of a text the end; a
    row whose last completion does not fit with one token ahead of it is left out.

    Args:
        rows: of one source.
        eos_token_id: ends each completion; see ``choose_eos_token_id``.
        max_length: in tokens, at least 2.

    Raises:
        DataError: a row cannot be trained on, or none is left; names file and line.
    """
    tokenize = _RowTokenizer(tokenizer, eos_token_id, settings)
    builder, source, num_skipped = DatasetBuilder(), "", 0
    for row in rows:
        source = row.source
        for whole in tokenize(row):
            tokens = _fitted(row, whole, settings.overlong, max_length)
            if tokens is None:
                num_skipped += 1
            else:
                builder.add(
                    tokens.token_ids,
                    tokens.is_target(),
                    prompt_length=tokens.prompt_length,
                    completion=tokens.completion,
                    line=row.line,
                )
    if not builder:
        reason = (
            f"all {num_skipped} rows are longer than {max_length} tokens" if num_skipped else "has no rows"
        )
        raise DataError(source, None, reason)
    return builder.build(source, num_skipped)


@dataclass(frozen=True, slots=True)
class _RowTokens:
    """A row's tokens.

    Attributes:
        targets: spans of what is learned, in order, none empty.
        prompt_length: where the last completion begins; 0 in a text, which is all completion.
        completion: the last one's text; empty for a text.
    """

    token_ids: Sequence[int]
    targets: Sequence[tuple[int, int]]
    prompt_length: int
    completion: str

    def is_target(self) -> bytes:
        """One byte per token, 0 or 1."""
        marks = bytearray(len(self.token_ids))
        for begin, end in self.targets:
            marks[begin:end] = b"\x01" * (end - begin)
        return bytes(marks)


class _RowTokenizer:
    """From a row to its tokens, of any length; a conversation may take several rows of tokens."""

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int, settings: DataSettings) -> None:
        self._tokenizer = tokenizer
        self._eos_token_id = eos_token_id
        self._settings = settings
        self._encode_completion: Callable[[str], Sequence[int]] = lru_cache(_NUM_REMEMBERED)(
            lambda text: tokenizer.encode(text, add_special_tokens=False)
        )

    def __call__(self, row: Row) -> list[_RowTokens]:
        match contents_of(row):
            case Prompted() as contents:
                return [self._prompted(row, contents)]
            case PlainText(text):
                return [self._plain_text(row, text)]
            case Conversation(messages):
                return self._conversation(row, messages)

    def _prompted(self, row: Row, contents: Prompted) -> _RowTokens:
        system = contents.system or self._settings.system
        if self._settings.chat:
            prompt = self._encode_chat(row, (*_system(system), ChatMessage("user", contents.prompt)))
        elif system:
            raise row.error("system: a plain-text prompt has none; set `chat`")
        else:
            prompt = self._tokenizer.encode(contents.prompt, add_special_tokens=True)
        if not prompt:
            raise row.error("prompt: has no tokens")
        return self._with_completion(row, prompt, contents.completion, [])

    def _plain_text(self, row: Row, text: str) -> _RowTokens:
        if row.fields.get("system") or self._settings.system:
            raise row.error("system: a text has none")
        tokens = self._tokenizer.encode(text, add_special_tokens=True)
        if tokens[-1:] != [self._eos_token_id]:
            tokens.append(self._eos_token_id)
        if len(tokens) < 2:
            raise row.error("text: has no tokens to learn")
        return _RowTokens(tokens, [(1, len(tokens))], 0, "")

    def _conversation(self, row: Row, messages: tuple[ChatMessage, ...]) -> list[_RowTokens]:
        """Each assistant's turn after what the server renders ahead of it.

        All turns share the last one's row where its prompt has them as they were generated. A turn that the template
        rewrites later, or whose white space melts into the marks around it, gets a row of its own.
        """
        if messages[0].role != "system":
            messages = (*_system(self._settings.system), *messages)
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        heads = [self._encode_chat(row, messages[:index]) for index in turns]
        found: list[_RowTokens] = []
        earlier: list[tuple[int, int]] = []
        for index, head in zip(turns[:-1], heads, strict=False):
            content = messages[index].content
            span = self._turn_within(heads[-1], head, content)
            if span is None:
                found.append(self._with_completion(row, head, content, []))
            else:
                earlier.append(span)
        return [*found, self._with_completion(row, heads[-1], messages[-1].content, earlier)]

    def _turn_within(self, prompt: list[int], head: list[int], content: str) -> tuple[int, int] | None:
        """Where a prompt has a turn's tokens, and its end if the template writes it; None if it has others."""
        for text in (content, content.strip()):  # templates may strip a turn
            tokens = self._encode_completion(text)
            end = len(head) + len(tokens)
            if tokens and [*head, *tokens] == prompt[:end]:
                return len(head), end + (prompt[end : end + 1] == [self._eos_token_id])
        return None

    def _with_completion(
        self, row: Row, prompt: Sequence[int], completion: str, earlier: Sequence[tuple[int, int]]
    ) -> _RowTokens:
        tokens = self._encode_completion(completion)
        if not tokens:
            raise row.error("completion: has no tokens")
        token_ids = (*prompt, *tokens, self._eos_token_id)
        return _RowTokens(token_ids, [*earlier, (len(prompt), len(token_ids))], len(prompt), completion)

    def _encode_chat(self, row: Row, messages: Sequence[ChatMessage]) -> list[int]:
        try:
            return self._tokenizer.encode_chat(messages)
        except FieldInvalidError as error:
            raise row.error(str(error)) from error


def _system(text: str) -> tuple[ChatMessage, ...]:
    return (ChatMessage("system", text),) if text else ()


def _fitted(row: Row, tokens: _RowTokens, overlong: str, max_length: int) -> _RowTokens | None:
    """The row within the length; None where it is left out."""
    length = len(tokens.token_ids)
    if length <= max_length:
        return tokens
    if overlong == "error":
        raise row.error(
            f"has {length} tokens; the limit is {max_length} (`max_length`): set `overlong` to skip or truncate"
        )
    if overlong == "skip":
        return None
    if not tokens.completion:
        return _RowTokens(tokens.token_ids[:max_length], [(1, max_length)], 0, "")
    return _without_beginning(tokens, length - max_length)


def _without_beginning(tokens: _RowTokens, num_cut: int) -> _RowTokens | None:
    """The row without its first tokens; None where nothing is left ahead of the last completion."""
    if tokens.prompt_length - num_cut < 1:
        return None
    # The first token that is left has nothing before it to be predicted from.
    spans = [(max(begin - num_cut, 1), end - num_cut) for begin, end in tokens.targets]
    return _RowTokens(
        token_ids=tokens.token_ids[num_cut:],
        targets=[(begin, end) for begin, end in spans if begin < end],
        prompt_length=tokens.prompt_length - num_cut,
        completion=tokens.completion,
    )
