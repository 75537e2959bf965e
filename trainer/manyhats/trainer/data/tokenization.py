"""Rows as tokens, as the server makes them from the same prompt and completion.

A prompt is tokenized as a request's text or chat is, and the completion as its continuation: what the server's
``Score`` computes, and what its ``Generate`` continues. The token that ends a generation follows; it is learned too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.text.ending import Ends
from manyhats.engine.text.prompt_text import Continuation, PromptText
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.trainer.data.chats import ChatRenderer, Turn
from manyhats.trainer.data.contents import (
    Conversation,
    Message,
    PlainText,
    Prompted,
    checked_contents,
    form_of,
    refuse_unread,
    unknown_fields,
)
from manyhats.trainer.data.dataset import (
    DataCounts,
    Dataset,
    DatasetBuilder,
    LabelTokens,
    RowTokens,
    fitted,
)
from manyhats.trainer.data.row import Row
from manyhats.trainer.errors import DataError, SettingError
from manyhats.trainer.settings.settings import DataSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenization:
    """How rows become tokens.

    Attributes:
        tokenizer: the base's, or the task's.
        ends: see ``find_ends``.
        settings: chat, system, and what to do with rows that are too long.
        max_length: of a row in tokens, at least 2.
        vocab_size: the number of rows of the base's embedding.
        now: the date chat templates may write; None for the present.
        on_row: called at each row and each turn; an exception from it ends tokenizing.
    """

    tokenizer: Tokenizer
    ends: Ends
    settings: DataSettings
    max_length: int
    vocab_size: int
    now: datetime | None = None
    on_row: Callable[[], None] = lambda: None


def tokenize_rows(rows: Iterable[Row], how: Tokenization, labels: Sequence[str] = ()) -> Dataset:
    """Tokenize rows, one at a time, and keep their tokens.

    A row longer than ``max_length`` is an error, skipped or truncated, as ``settings.overlong`` says. Truncation keeps
    what is learned: it cuts off the beginning of a prompt or conversation, and the end of a text; a row whose last
    completion does not fit with one token before it is left out.

    Args:
        rows: of one source.
        how: see ``Tokenization``.
        labels: what to tokenize after each row's prompt, besides its completion.

    Raises:
        DataError: a row cannot be trained on, or none is left; names file and line.
        SettingError: a label has no tokens, or two have the same.
    """
    tokenize = _RowTokenizer(how, labels)
    builder, source = DatasetBuilder(), ""
    num_skipped = num_truncated = 0
    for row in rows:
        source = row.source
        how.on_row()
        for whole in tokenize(row):
            tokens = fitted(row, whole, how.settings.overlong, how.max_length)
            if tokens is None:
                num_skipped += 1
                continue
            num_truncated += len(tokens.token_ids) < len(whole.token_ids)
            builder.add(
                tokens.token_ids,
                tokens.is_target(),
                prompt_length=tokens.prompt_length,
                completion=tokens.completion,
                line=row.line,
                labels=tokens.labels,
                form=whole.form,
            )
    if not builder:
        reason = (
            f"all {num_skipped} rows are longer than {how.max_length} tokens"
            if num_skipped
            else "has no rows"
        )
        raise DataError(source, None, reason)
    counts = DataCounts(
        skipped=num_skipped,
        truncated=num_truncated,
        beginnings=tokenize.num_beginnings,
        ends=tokenize.num_ends,
        ignored=dict(tokenize.ignored),
    )
    return builder.build(source, counts)


class _RowTokenizer:
    """From a row to its tokens, of any length; a conversation may take several rows of tokens.

    Attributes:
        num_beginnings, num_ends, ignored: see ``DataCounts``.
    """

    def __init__(self, how: Tokenization, labels: Sequence[str]) -> None:
        self._how = how
        self._tokenizer = how.tokenizer
        self._ends = how.ends
        self._settings = how.settings
        self._chats = ChatRenderer(how.tokenizer, how.ends, how.now)
        self._labels = labels
        self.num_beginnings = 0
        self.num_ends = 0
        self.ignored: Counter[str] = Counter()

    def __call__(self, row: Row) -> list[RowTokens]:
        contents = checked_contents(row, self._settings)
        self._note_ignored(unknown_fields(row))
        match contents:
            case Prompted():
                made = [self._prompted(row, contents)]
            case PlainText(text):
                made = [self._plain_text(row, text)]
            case Conversation():
                made = self._conversation(row, contents)
        form = form_of(contents, is_chat=self._settings.chat)
        made = [replace(tokens, form=form) for tokens in made]
        for tokens in made:
            self._check_known(row, tokens.token_ids)
        return made

    def _prompted(self, row: Row, contents: Prompted) -> RowTokens:
        if self._settings.chat:
            messages: list[Message] = [{"role": "user", "content": contents.prompt}]
            if contents.system:
                messages.insert(0, {"role": "system", "content": contents.system})
            self._note_unread_by_template(row, messages, contents.variables)
            prompt = self._rendered_prompt(self._chats.prompt(row, messages, contents.variables))
        else:
            prompt = self._tokenizer.prompt(contents.prompt)
            self.num_beginnings += prompt.begins_itself
        if not prompt.token_ids:
            raise row.error("prompt: has no tokens")
        completion, end = self._ends.split(contents.completion)
        self.num_ends += end is not None
        return self._with_completion(row, prompt, completion, [], end)

    def _plain_text(self, row: Row, text: str) -> RowTokens:
        text, end = self._ends.split(text)
        self.num_ends += end is not None
        whole = self._tokenizer.prompt(text)
        self.num_beginnings += whole.begins_itself
        tokens = [*whole.token_ids, self._ends.token_id if end is None else end]
        if len(tokens) < 2:
            raise row.error("text: has no tokens to learn")
        return RowTokens(tokens, [(1, len(tokens))], 0, "")

    def _conversation(self, row: Row, conversation: Conversation) -> list[RowTokens]:
        """Each learned turn, after what the server renders before it.

        All turns share the last one's row if its prompt has them as they were generated. A turn that the template
        rewrites later, or whose white space merges with the marks around it, gets its own row.
        """
        conversation = self._without_ends(conversation)
        self._note_unread_by_template(row, conversation.messages, conversation.variables)
        turns: list[Turn] = []
        for turn in self._chats.turns(row, conversation):
            self._how.on_row()
            turns.append(turn)
        *earlier, last = turns
        prompt = self._rendered_prompt(last.head)
        found: list[RowTokens] = []
        spans: list[tuple[int, int]] = []
        for turn in earlier:
            self._how.on_row()
            span = self._turn_within(prompt, turn)
            if span is None:
                own = self._rendered_prompt(turn.head)
                found.append(self._with_completion(row, own, turn.text, [], None))
            else:
                spans.append(span)
        return [*found, self._with_completion(row, prompt, last.text, spans, None)]

    def _without_ends(self, conversation: Conversation) -> Conversation:
        """The conversation without ends in its turns, which get them from the template."""
        messages = [*conversation.messages]
        for index, message in enumerate(messages):
            content = message.get("content")
            if message["role"] == "assistant" and isinstance(content, str):
                text, end = self._ends.split_turn(content)
                if end is not None:
                    self.num_ends += 1
                    messages[index] = {**message, "content": text}
        return replace(conversation, messages=tuple(messages))

    def _turn_within(self, prompt: PromptText, turn: Turn) -> tuple[int, int] | None:
        """Where a prompt has a turn's tokens, and its end if the template writes it; None if the tokens differ."""
        if not prompt.text.startswith(turn.head) or not prompt.text.startswith(turn.text, len(turn.head)):
            return None
        head = prompt.beginning(turn.head)
        if head is None:
            return None
        begin = len(head.token_ids)
        found = _followed_by(head, turn.text)
        if found is None or found.num_prompt_tokens != begin:
            return None
        end = begin + len(found.token_ids)
        if prompt.token_ids[begin:end] != found.token_ids:
            return None
        return begin, end + (prompt.token_ids[end : end + 1] == (self._ends.token_id,))

    def _with_completion(
        self,
        row: Row,
        prompt: PromptText,
        completion: str,
        earlier: Sequence[tuple[int, int]],
        end: int | None,
    ) -> RowTokens:
        """A prompt, and a completion with its end; ``end`` is the one it had, if any."""
        last = self._ends.token_id if end is None else end
        if completion or end is None:
            try:
                behind = prompt.followed_by(completion)
            except FieldInvalidError as error:
                raise row.error(f"completion: {error.description}") from error
        else:
            behind = Continuation(len(prompt.token_ids), ())
        begin = behind.num_prompt_tokens
        token_ids = (*prompt.token_ids[:begin], *behind.token_ids, last)
        return RowTokens(
            token_ids,
            [*(span for span in earlier if span[1] <= begin), (begin, len(token_ids))],
            begin,
            completion,
            self._label_tokens(row, prompt, begin),
        )

    def _label_tokens(self, row: Row, prompt: PromptText, begin: int) -> tuple[LabelTokens, ...]:
        """The tokens of each label after the prompt, of which the row's own completion left this many tokens."""
        found: dict[LabelTokens, str] = {}
        for label in self._labels:
            text, end = self._ends.split(label)
            try:
                behind = prompt.followed_by(text)
            except FieldInvalidError as error:
                raise SettingError("labels", f"{label!r} {error.description}") from error
            given = prompt.token_ids[begin : behind.num_prompt_tokens]
            tokens = LabelTokens(
                num_taken=max(0, begin - behind.num_prompt_tokens),
                num_given=len(given),
                token_ids=(*given, *behind.token_ids, self._ends.token_id if end is None else end),
            )
            if tokens in found:
                raise SettingError("labels", f"{found[tokens]!r} and {label!r} have the same tokens")
            self._check_known(row, tokens.token_ids, f"the label {label!r} ")
            found[tokens] = label
        return tuple(found)

    def _rendered_prompt(self, text: str) -> PromptText:
        # The template writes the special tokens itself.
        return self._tokenizer.prompt(text, add_special_tokens=False)

    def _note_unread_by_template(
        self, row: Row, messages: Sequence[Message], variables: Mapping[str, object]
    ) -> None:
        unread = self._chats.unread(row, messages, variables)
        refuse_unread(row, unread, "the chat template does not read it", self._settings)
        self._note_ignored(unread)

    def _note_ignored(self, names: Sequence[str]) -> None:
        self.ignored.update({_field(name) for name in names})

    def _check_known(self, row: Row, token_ids: Sequence[int], whose: str = "") -> None:
        """Check that the base has an embedding for each token."""
        largest = max(token_ids)
        if largest >= self._how.vocab_size:
            piece = self._tokenizer.piece(largest)
            raise row.error(
                f"{whose}has the token {largest} ({piece!r}); the base's embedding has {self._how.vocab_size} rows"
            )


def _field(name: str) -> str:
    """A field's name, a message's without its number."""
    return f"messages[].{name.partition('].')[2]}" if name.startswith("messages[") else name


def _followed_by(prompt: PromptText, text: str) -> Continuation | None:
    try:
        return prompt.followed_by(text)
    except FieldInvalidError:
        return None
