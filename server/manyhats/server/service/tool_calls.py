"""The calls of tools in an answer, as it grows."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhats.engine.output import FinishReason, StepOutput
from manyhats.engine.request import StoppingParams
from manyhats.engine.text.stopping import StopChecker
from manyhats.server.service.tool_wrappings import Wrapping, wrapping_of

if TYPE_CHECKING:
    from manyhats.engine.request import Request
    from manyhats.engine.text.tokenizer import Tokenizer
    from manyhats.server.service.conversations import ChatPrompt
    from manyhats.server.service.tool_use import ToolUse

_NO_LIMIT = 2**62
_STRING_OR_BRACKET = re.compile(r'["{}\[\]]')
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')


@dataclass(frozen=True, slots=True)
class CallPiece:
    """What an output adds to a call: its beginning, which has id and name, or a piece of its arguments.

    Attributes:
        index: of the call within the answer.
        id: "" but at its beginning.
        name: of the function; "" but at its beginning.
        arguments: the next characters of a JSON object.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """What an output adds to an answer: text, and then calls."""

    text: str
    calls: tuple[CallPiece, ...] = ()


def call_reader(prompt: ChatPrompt, asked: Request, tokenizer: Tokenizer) -> CallReader | None:
    """The reader of a new answer to a request; None if it makes no calls."""
    if prompt.tool_use is None or not prompt.tool_use.may_call:
        return None
    skips = asked.response.skip_special_tokens
    return CallReader(prompt.tool_use, tokenizer, asked.stopping, skip_special_tokens=skips)


class CallReader:
    """Splits one answer, which the constraint of its tool use holds to a wrapping, into free text and calls.

    The text is the engine's, as it would be without tools, up to where the calls begin. The calls are read from the
    tokens themselves: exact to the last space, with special tokens as their literals.

    Args:
        tool_use: what may be called.
        tokenizer: the answer's.
        stopping: what may end it.
        skip_special_tokens: whether its text leaves them out.
    """

    def __init__(
        self,
        tool_use: ToolUse,
        tokenizer: Tokenizer,
        stopping: StoppingParams,
        *,
        skip_special_tokens: bool,
    ) -> None:
        wrapping = wrapping_of(tokenizer.chat_template or "")
        names = [each.name for each in tool_use.functions]
        self._exact = tokenizer.stream(skip_special_tokens=False, is_exact=True)
        self._text = _Text(wrapping, names, tokenizer, skip_special_tokens=skip_special_tokens)
        self._calls = _Calls(wrapping, names)
        self._keeps_stop = stopping.include_stop_sequence
        # As much of the calls' text as may be the beginning of a stop sequence.
        self._num_held = max(map(len, stopping.stop_sequences), default=1) - 1
        self._held = ""

    def push(self, output: StepOutput) -> AnswerPiece:
        """Take an output."""
        was_text = not self._text.has_ended
        leaves_out_last = isinstance(output.stop, int) and not self._keeps_stop
        for token in output.tokens[:-1] if leaves_out_last else output.tokens:
            exact = self._exact.push(token.id)
            self._held += exact if self._text.has_ended else self._text.push(token.id, exact)
        text = self._text.release(output) if was_text else ""
        num_held = self._num_held if output.finish_reason is None else 0
        let_out = self._up_to_stop(output)[: max(0, len(self._held) - num_held)]
        self._held = self._held[len(let_out) :]
        return AnswerPiece(text, tuple(self._calls.push(let_out)))

    def _up_to_stop(self, output: StepOutput) -> str:
        """What is held of the calls' text, up to what ended the answer, if that is a text."""
        if isinstance(output.stop, str) and (start := self._held.find(output.stop)) >= 0:
            return self._held[: start + len(output.stop) if self._keeps_stop else start]
        return self._held

    def ends_in_calls(self, reason: FinishReason | None) -> bool:
        """Whether an answer that ended for this reason ended after a call, rather than within one or without any."""
        return reason in (FinishReason.EOS, FinishReason.STOP_SEQUENCE) and self._calls.is_complete


class _Text:
    """The text ahead of the calls: what is certain to be that, as far as the engine has released it."""

    def __init__(
        self, wrapping: Wrapping, names: Sequence[str], tokenizer: Tokenizer, *, skip_special_tokens: bool
    ) -> None:
        self.has_ended = False
        opening = wrapping.opening
        self._opening_id = tokenizer.token_id(opening) if opening in wrapping.tokens else None
        is_searched = bool(opening) and self._opening_id is None
        # The literal of an opening is looked for, and cut off, as a stop sequence is.
        self._checker = StopChecker(
            StoppingParams(max_new_tokens=_NO_LIMIT, stop_sequences=[opening] if is_searched else []),
            frozenset(),
        )
        # Without an opening, the whole answer is a call or none is.
        self._beginnings = [] if opening else [f"{wrapping.head}{name}{wrapping.middle}" for name in names]
        self._beginning = ""
        self._shown = tokenizer.stream(skip_special_tokens=skip_special_tokens)
        self._ahead = ""
        self._engines = ""

    def push(self, token_id: int, exact: str) -> str:
        """Take a token and its text; returns that if calls have begun in it, and all before it that may be theirs."""
        if token_id == self._opening_id:
            self._ahead += self._shown.flush()
            self.has_ended = True
            return exact
        text, reason = self._checker.push(token_id, exact, 1, self._shown.push(token_id))
        self._ahead += text
        if self._beginnings:
            exact = self._beginning = self._beginning + exact
            if exact.startswith(tuple(self._beginnings)):
                self._ahead, self.has_ended = "", True
            elif not any(each.startswith(exact) for each in self._beginnings):
                self._beginnings.clear()
        self.has_ended = self.has_ended or reason is not None
        return exact if self.has_ended else ""

    def release(self, output: StepOutput) -> str:
        """The next of the text, after an output."""
        self._engines += output.text
        ends = output.finish_reason is not None
        if self.has_ended and not ends:
            text = self._ahead  # the engine has it, too, but may hold it back
        elif ends and not self.has_ended:
            text = self._engines
        elif self._beginnings:
            text = ""
        else:
            text = min(self._ahead, self._engines, key=len)
        # Both are kept from there on only.
        self._ahead, self._engines = self._ahead[len(text) :], self._engines[len(text) :]
        return text


class _Calls:
    """Reads calls from their text, from the opening on."""

    def __init__(self, wrapping: Wrapping, names: Sequence[str]) -> None:
        name = "|".join(map(re.escape, names))
        self._beginning = re.compile(f"{re.escape(wrapping.head)}({name}){re.escape(wrapping.middle)}")
        self._held = ""
        self._num_begun = 0
        self._arguments: _Object | None = None

    @property
    def is_complete(self) -> bool:
        """Whether there are calls, and the last one's arguments are complete."""
        return self._num_begun > 0 and self._arguments is None

    def push(self, text: str) -> Iterator[CallPiece]:
        """Take the next characters."""
        self._held += text
        while self._held:
            if self._arguments is None:
                beginning = self._beginning.search(self._held)
                if beginning is None:
                    return
                self._held = self._held[beginning.end() :]
                self._arguments = _Object()
                yield CallPiece(self._num_begun, f"call_{secrets.token_hex(12)}", beginning[1])
                self._num_begun += 1
            piece, self._held = self._arguments.split(self._held)
            if piece:
                yield CallPiece(self._num_begun - 1, arguments=piece)
            if self._arguments.is_complete:
                self._arguments = None


class _Object:
    """Finds the end of a JSON object, piece by piece."""

    def __init__(self) -> None:
        self.is_complete = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def split(self, text: str) -> tuple[str, str]:
        """What of the next characters belongs to it, and what is behind it."""
        if not self._depth:
            text = text.lstrip()
        at = 0
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_QUOTE_OR_ESCAPE if self._in_string else _STRING_OR_BRACKET).search(text, at)
            if found is None:
                break
            at = found.end()
            match found[0]:
                case '"':
                    self._in_string = not self._in_string
                case "\\":
                    self._is_escaped = True
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
            if not self._depth:
                self.is_complete = True
                return text[:at], text[at:]
        return text, ""
