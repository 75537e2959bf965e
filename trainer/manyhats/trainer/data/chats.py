"""Conversations as text by a chat template, and which parts the assistant learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.text.chat_template import Rendering, variables_of
from manyhats.engine.text.ending import Ends
from manyhats.engine.text.fitted_messages import fitted_to
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.trainer.data.contents import Conversation, Message
from manyhats.trainer.data.row import KWARGS, LISTS, Row

_ALWAYS_READ = frozenset({"role", "content"})


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of the assistant.

    Attributes:
        head: the text before it, as the server renders it.
        text: what it says, as the template renders it, without its end.
    """

    head: str
    text: str


class ChatRenderer:
    """Renders the conversations of rows, and notes which parts the template does not read.

    Args:
        tokenizer: has the template.
        ends: of turns.
        now: the date templates may write.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Ends, now: datetime | None) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._now = now

    def prompt(self, row: Row, messages: Sequence[Message], variables: Mapping[str, object]) -> str:
        """The text of messages, up to where the assistant's turn begins.

        Raises:
            DataError: there is no template, or it refuses them.
        """
        return self._rendered(row, messages, variables, add_generation_prompt=True)

    def turns(self, row: Row, conversation: Conversation) -> Iterator[Turn]:
        """Each learned turn, in order: what the template writes between the server's prompt and the end.

        Raises:
            DataError: as ``prompt``; or a turn says nothing.
        """
        messages, variables = conversation.messages, conversation.variables
        whole = self._rendered(row, messages, variables, add_generation_prompt=False)
        return (self._turn(row, conversation, index, whole) for index in conversation.learned)

    def _turn(self, row: Row, conversation: Conversation, index: int, whole: str) -> Turn:
        messages, variables = conversation.messages, conversation.variables
        head = self.prompt(row, messages[:index], variables)
        text = self._in_whole(messages[index], head, whole)
        if text is None:
            until = messages[: index + 1]
            rendered = self._rendered(row, until, variables, add_generation_prompt=False)
            text = self._behind(head, rendered, messages[index])
        if not text:
            raise row.error(f"messages: the template renders nothing in turn {index} that could be learned")
        return Turn(head, text)

    def _in_whole(self, message: Message, head: str, whole: str) -> str | None:
        """A plain message's text, if the rendering has it between its head and its end; None otherwise."""
        content, end = message["content"], self._ends.of_turn
        if not (
            message.keys() <= _ALWAYS_READ and isinstance(content, str) and end and whole.startswith(head)
        ):
            return None
        for text in (content, content.strip()):  # templates may strip a turn
            if text and whole.startswith(text, len(head)) and whole.startswith(end, len(head) + len(text)):
                return text
        return None

    def _behind(self, head: str, rendered: str, message: Message) -> str:
        """What the rendering has after the head; the message's content if it begins differently."""
        if not rendered.startswith(head):
            content = message.get("content")
            return content if isinstance(content, str) else ""
        text = rendered[len(head) :]
        end = self._ends.of_turn
        if end and text.endswith(end):
            return text[: -len(end)]
        return self._ends.split(text)[0]

    def _rendered(
        self,
        row: Row,
        messages: Sequence[Message],
        variables: Mapping[str, object],
        *,
        add_generation_prompt: bool,
    ) -> str:
        try:
            rendering = Rendering(variables=variables, add_generation_prompt=add_generation_prompt)
            return self._tokenizer.render_chat(messages, rendering=rendering, now=self._now)
        except FieldInvalidError as error:
            raise row.error(str(error)) from error

    def unread(self, row: Row, messages: Sequence[Message], variables: Mapping[str, object]) -> list[str]:
        """Parts that the template would not read, such as ``tools`` or ``messages[2].reasoning_content``."""
        template = self._tokenizer.chat_template
        if template is None:
            return []  # rendering reports it
        unread = [
            name if name in LISTS else f"{KWARGS}.{name}"
            for name in sorted(variables.keys() - _variables_of(row, template))
        ]
        if any(not message.keys() <= _ALWAYS_READ for message in messages):
            watched = [_Watched(dict(each)) for each in fitted_to(template, messages)]
            self._rendered(row, watched, variables, add_generation_prompt=False)
            unread += [
                f"messages[{index}].{key}"
                for index, message in enumerate(watched)
                for key, value in dict.items(message)
                if value not in (None, "", [], {}) and key not in _keys_read(message) | _ALWAYS_READ
            ]
        return unread


def _variables_of(row: Row, template: str) -> frozenset[str]:
    try:
        return variables_of(template)
    except FieldInvalidError as error:
        raise row.error(str(error)) from error


class _Watched(dict[str, Any]):
    """A message that records which of its keys are read."""

    def __init__(self, message: Message) -> None:
        super().__init__(message)
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """See ``dict.get``."""
        self._read.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        """See ``dict.items``; all of it is read."""
        self._read |= self.keys()
        return super().items()

    def values(self) -> Any:
        """See ``dict.values``; all of it is read."""
        self._read |= self.keys()
        return super().values()


def _keys_read(message: _Watched) -> set[str]:
    return message._read
