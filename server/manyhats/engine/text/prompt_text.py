"""Prompts that something is put behind: what a text becomes as their continuation.

A byte-level tokenizer makes the same tokens of a text wherever it stands, so a continuation is tokenized by itself.
Others do not: a SentencePiece tokenizer puts a space ahead of a text, and pieces may run over the boundary. There
prompt and continuation are tokenized as one text, and what both have in common is the prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from tokenizers import Encoding, models
from tokenizers import Tokenizer as Backend

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.text.tokenizer_files import single_steps

TAIL_LENGTH = 512
"""Characters of a prompt's end that are tokenized with each continuation, where that tells as much as all of it."""

_MIN_AGREEMENT = 32
"""Tokens at the end of a prompt that it must share with its tail alone, before the tail stands for it."""

_MIN_MARGIN = 8
"""Of those, the first so many must be the same with the continuation behind them."""

_NEUTRAL_TEXTS = ("\n", "a", ".")


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text behind a prompt.

    Attributes:
        num_prompt_tokens: how many of the prompt's tokens stand ahead of it, at least one. Fewer than all where the
            prompt's last ones became others together with the text.
        token_ids: what follows them, at least one: the text, and what it took from the prompt.
    """

    num_prompt_tokens: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScoreTokens:
    """A prompt and its continuations, as a ``ScoreRequest`` has them; the fields are its."""

    prompt_token_ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    num_given: tuple[int, ...]


def score_tokens(prompt_token_ids: Sequence[int], continuations: Sequence[Continuation]) -> ScoreTokens:
    """Continuations of one prompt to be scored together: computed once is what all of them leave of the prompt.

    Each one's score is what it is alone: what else stands ahead of it comes with it, and is given.
    """
    shared = min((each.num_prompt_tokens for each in continuations), default=len(prompt_token_ids))
    return ScoreTokens(
        prompt_token_ids=tuple(prompt_token_ids[:shared]),
        continuations=tuple(
            (*prompt_token_ids[shared : each.num_prompt_tokens], *each.token_ids) for each in continuations
        ),
        num_given=tuple(each.num_prompt_tokens - shared for each in continuations),
    )


class PromptText:
    """A prompt whose text is known, and its tokens.

    Args:
        backend: of the tokenizer.
        text: at least one character.
        head: tokens that stand ahead of the text's own.
        own: the text's own, without special tokens around them.
        is_byte_level: see ``is_byte_level``.
        begins_itself: whether the text has what would stand ahead of it, or its end.

    Attributes:
        text, begins_itself: as given.
        token_ids: head and own.
    """

    def __init__(
        self,
        backend: Backend,
        text: str,
        head: Sequence[int],
        own: Sequence[int],
        *,
        is_byte_level: bool,
        begins_itself: bool = False,
    ) -> None:
        self._backend = backend
        self._own = own
        self._is_byte_level = is_byte_level
        self.text = text
        self.begins_itself = begins_itself
        self.token_ids: tuple[int, ...] = (*head, *own)

    def followed_by(self, text: str) -> Continuation:
        """What a text becomes behind this prompt.

        Raises:
            FieldInvalidError: ``text``: it has no tokens, or none of the prompt is left ahead of it.
        """
        if self._is_byte_level:
            return _some(len(self.token_ids), _ids(self._backend, text))
        tail, tokens, num_shared = self._tail
        encoding = _encoded(self._backend, tail + text)
        ids: list[int] = encoding.ids  # made anew each time it is asked for
        num_common = _num_common(tokens, ids)
        if len(tail) < len(self.text) and num_common < len(tokens) - num_shared + _MIN_MARGIN:
            tail, tokens = self.text, self._own
            encoding = _encoded(self._backend, tail + text)
            ids = encoding.ids
            num_common = _num_common(tokens, ids)
        if num_common == len(ids) and num_common and encoding.offsets[-1][1] > len(tail):
            num_common -= 1  # the text was taken into the prompt's last token, an unknown one
        return _some(len(self.token_ids) - len(tokens) + num_common, ids[num_common:])

    @property
    def length_again(self) -> int:
        """Characters of this prompt that are tokenized with each text behind it, as a rule."""
        return 0 if self._is_byte_level else len(self._tail[0])

    def beginning(self, text: str) -> PromptText | None:
        """The prompt that a beginning of this text is; None where it has other tokens by itself.

        It takes as long as the end of the beginning does, not all of it.
        """
        head = self.token_ids[: len(self.token_ids) - len(self._own)]
        ends = self._token_ends
        place = bisect_right(ends, len(text))
        for count in (place, place - 1, place + 1):  # some offsets leave out spaces
            if 0 < count <= len(ends) and self._is_own(text, count):
                own = self._own[:count]
                return PromptText(self._backend, text, head, own, is_byte_level=self._is_byte_level)
        return None

    def _is_own(self, text: str, count: int) -> bool:
        """Whether the first so many of the text's own tokens are those of a beginning of it."""
        own = self._own[max(0, count - 4 * TAIL_LENGTH) : count]
        length = TAIL_LENGTH
        while length < len(text):
            tokens = _ids(self._backend, text[-length:])
            num_shared = _num_common_last(tokens, own)
            if num_shared >= _MIN_AGREEMENT:
                return True
            if len(tokens) > 2 * _MIN_AGREEMENT:
                return False
            length *= 2
        return _ids(self._backend, text) == list(self._own[:count])

    @cached_property
    def _token_ends(self) -> list[int]:
        """Of each own token, where it ends in the text; ascending."""
        ends = [end for _, end in _encoded(self._backend, self.text).offsets]
        return list(accumulate(ends, max))

    @cached_property
    def _tail(self) -> tuple[str, Sequence[int], int]:
        """The end of the text, its tokens by itself, and how many of the last ones are the prompt's last.

        Where the two agree on as many tokens as that, what lies before has no influence on what comes behind.
        """
        length = TAIL_LENGTH
        while length < len(self.text):
            tail = self.text[-length:]
            tokens = _ids(self._backend, tail)
            num_shared = _num_common_last(tokens, self._own)
            if num_shared >= _MIN_AGREEMENT:
                return tail, tokens, num_shared
            length *= 2
        return self.text, self._own, len(self._own)


def followed_by(backend: Backend, text: str, *, is_byte_level: bool) -> tuple[int, ...]:
    """What a text becomes behind tokens whose text is not known.

    Raises:
        FieldInvalidError: ``text``: it has no tokens.
    """
    if not is_byte_level:
        for neutral in _NEUTRAL_TEXTS:
            before, whole = _ids(backend, neutral), _ids(backend, neutral + text)
            if before == whole[: len(before)] and len(whole) > len(before):
                return tuple(whole[len(before) :])
    return _some(1, _ids(backend, text)).token_ids


def is_byte_level(backend: Backend) -> bool:
    """Whether a text's tokens are the same at the beginning of a text and behind another.

    True of tokenizers that split words off and know every byte (GPT-2, Llama 3, Qwen), unless they put a space
    ahead of a text.
    """
    steps = [*single_steps(backend.normalizer), *single_steps(backend.pre_tokenizer)]
    adds_space = any(
        step["type"] in ("Prepend", "Metaspace") or step.get("add_prefix_space", False) for step in steps
    )
    return not adds_space and any(step["type"] == "ByteLevel" for step in steps)


def special_tokens_ahead(backend: Backend) -> tuple[int, ...]:
    """The tokens that the post-processor puts ahead of a text."""
    # The text of another model: this one may have no token for it.
    text = Backend(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    encoding = backend.post_process(text)
    own = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
    return tuple(encoding.ids[: own[0]] if own else encoding.ids)


def head_of(own: Sequence[int], ahead: Sequence[int]) -> tuple[int, ...]:
    """Which of the tokens that stand ahead of a text it lacks; one that was rendered beforehand has them."""
    for length in range(min(len(own), len(ahead)), 0, -1):
        if list(own[:length]) == list(ahead[-length:]):
            return tuple(ahead[: len(ahead) - length])
    return tuple(ahead)


def _some(num_prompt_tokens: int, token_ids: Sequence[int]) -> Continuation:
    if not token_ids:
        raise FieldInvalidError("text", "has no tokens")
    if num_prompt_tokens < 1:
        raise FieldInvalidError(
            "text", "runs into one token with the prompt's first, so nothing is left ahead of it"
        )
    return Continuation(num_prompt_tokens, tuple(token_ids))


def _encoded(backend: Backend, text: str) -> Encoding:
    # A batch of one, because that leaves the interpreter to other threads meanwhile.
    return backend.encode_batch([text], add_special_tokens=False)[0]


def _ids(backend: Backend, text: str) -> list[int]:
    """As ``_encoded``, in a third of the time: without the tokens' places in the text."""
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))


def _num_common_last(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both end with."""
    length = min(len(first), len(second))
    return _num_common(first[len(first) - length :][::-1], second[len(second) - length :][::-1])
