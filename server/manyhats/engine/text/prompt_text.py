"""Prompts with continuations: the tokens of a text after a prompt.

A byte-level tokenizer makes the same tokens from a text wherever it stands, so a continuation is tokenized separately.
Others do not: a SentencePiece tokenizer puts a space before a text, and pieces may cross the boundary. There, prompt
and continuation are tokenized as one text, and the tokens that it shares with the prompt alone are the prompt.
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
"""Characters of a prompt's end that are tokenized with each continuation, if that is as good as all of it."""

_MIN_AGREEMENT = 32
"""Tokens at a prompt's end that its tail alone must also give, before the tail may stand for the prompt."""

_MIN_MARGIN = 8
"""Of those, this many first ones must stay the same with the continuation after them."""

_NEUTRAL_TEXTS = ("\n", "a", ".")


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text after a prompt.

    Attributes:
        num_prompt_tokens: how many of the prompt's tokens come before it, at least one. Fewer than all if the prompt's
            last ones changed together with the text.
        token_ids: what follows them, at least one: the text, and whatever it took from the prompt.
    """

    num_prompt_tokens: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScoreTokens:
    """A prompt and its continuations, as in a ``ScoreRequest``, whose fields these are."""

    prompt_token_ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    num_given: tuple[int, ...]


def score_tokens(prompt_token_ids: Sequence[int], continuations: Sequence[Continuation]) -> ScoreTokens:
    """Continuations of one prompt, to be scored together: what all of them keep of the prompt is computed once.

    Each one's score is the same as alone: the rest of the prompt before it comes with it, and is given.
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
        head: tokens that come before the text's own.
        own: the text's own, without special tokens around them.
        is_byte_level: see ``is_byte_level``.
        begins_itself: whether the text already has the tokens that would come before it, or their end.

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
        """The tokens of a text after this prompt.

        Raises:
            FieldInvalidError: ``text``: it has no tokens, or nothing of the prompt is left before it.
        """
        if self._is_byte_level:
            return _some(len(self.token_ids), _ids(self._backend, text))
        tail, tokens, num_shared = self._tail
        encoding = _encoded(self._backend, tail + text)
        ids: list[int] = encoding.ids  # computed anew at each access
        num_common = _num_common(tokens, ids)
        if len(tail) < len(self.text) and num_common < len(tokens) - num_shared + _MIN_MARGIN:
            tail, tokens = self.text, self._own
            encoding = _encoded(self._backend, tail + text)
            ids = encoding.ids
            num_common = _num_common(tokens, ids)
        if num_common == len(ids) and num_common and encoding.offsets[-1][1] > len(tail):
            num_common -= 1  # the text merged into the prompt's last token, an unknown one
        return _some(len(self.token_ids) - len(tokens) + num_common, ids[num_common:])

    @property
    def length_again(self) -> int:
        """How many characters of this prompt are usually tokenized with each text after it."""
        return 0 if self._is_byte_level else len(self._tail[0])

    def beginning(self, text: str) -> PromptText | None:
        """A beginning of this text as a prompt; None if, on its own, it has other tokens.

        The cost is that of the beginning's end, not of all of it.
        """
        head = self.token_ids[: len(self.token_ids) - len(self._own)]
        ends = self._token_ends
        place = bisect_right(ends, len(text))
        for count in (place, place - 1, place + 1):  # some offsets exclude spaces
            if 0 < count <= len(ends) and self._is_own(text, count):
                own = self._own[:count]
                return PromptText(self._backend, text, head, own, is_byte_level=self._is_byte_level)
        return None

    def _is_own(self, text: str, count: int) -> bool:
        """Whether this many of the text's own first tokens are those of a beginning of it."""
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
        """Where each own token ends in the text; ascending."""
        ends = [end for _, end in _encoded(self._backend, self.text).offsets]
        return list(accumulate(ends, max))

    @cached_property
    def _tail(self) -> tuple[str, Sequence[int], int]:
        """The end of the text, its tokens on its own, and how many of the last ones are the prompt's last.

        If the two agree on that many tokens, what lies before has no influence on what comes after.
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
    """The tokens of a text after tokens whose text is not known.

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
    """Whether a text's tokens are the same at the beginning and after another text.

    True of tokenizers that split off words and know every byte (GPT-2, Llama 3, Qwen), unless they put a space before a
    text.
    """
    steps = [*single_steps(backend.normalizer), *single_steps(backend.pre_tokenizer)]
    adds_space = any(
        step["type"] in ("Prepend", "Metaspace") or step.get("add_prefix_space", False) for step in steps
    )
    return not adds_space and any(step["type"] == "ByteLevel" for step in steps)


def special_tokens_ahead(backend: Backend) -> tuple[int, ...]:
    """The tokens that the post-processor puts before a text."""
    # Another model's text, since this one may have no token for it.
    text = Backend(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    encoding = backend.post_process(text)
    own = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
    return tuple(encoding.ids[: own[0]] if own else encoding.ids)


def head_of(own: Sequence[int], ahead: Sequence[int]) -> tuple[int, ...]:
    """Which of the tokens that belong before a text it lacks; one that was rendered beforehand has them."""
    for length in range(min(len(own), len(ahead)), 0, -1):
        if list(own[:length]) == list(ahead[-length:]):
            return tuple(ahead[: len(ahead) - length])
    return tuple(ahead)


def _some(num_prompt_tokens: int, token_ids: Sequence[int]) -> Continuation:
    if not token_ids:
        raise FieldInvalidError("text", "has no tokens")
    if num_prompt_tokens < 1:
        raise FieldInvalidError(
            "text", "merges into one token with the start of the prompt, so nothing is left before it"
        )
    return Continuation(num_prompt_tokens, tuple(token_ids))


def _encoded(backend: Backend, text: str) -> Encoding:
    # A batch of one, because that releases the interpreter lock meanwhile.
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
