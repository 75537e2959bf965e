"""A continuation's tokens are those that prompt and continuation have as one text, behind what both have in common."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.text.prompt_text import Continuation, score_tokens
from manyhats.engine.text.tokenizer import ChatMessage, Tokenizer
from support.factories.spaced_tokenizers import KINDS, spaced_tokenizer
from support.factories.tiny_models import SPECIAL_TOKENS, tiny_tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = [
    "the",
    "The",
    "Paris",
    "Par",
    "is",
    " ",
    "  ",
    "\n",
    ".",
    ",",
    "x):",
    "(",
    "42",
    "1",
    "0",
    "é",
    "fox",
    "ten",
]
TEXTS = st.lists(st.sampled_from([*WORDS, *(f" {word}" for word in WORDS)]), min_size=1, max_size=8).map(
    "".join
)
PAIRS = [
    ("It is", " Paris"),
    ("It is", "."),
    ("It is Par", "is"),
    ("It is ", "Paris"),
    ("def f(", "x):"),
    ("one\n", "two"),
    ("one", "\ntwo"),
    ("the answer is 4", "2"),
    ("10", "0"),
    ("a ", " b"),
    ("the quick", " brown fox"),
    ("yes", " no"),
    ("It is</s>", " Paris"),
    ("<s>It is", " Paris</s>"),
    ("twel", "ve"),
    ("é", "è"),
    ("x", "</s>"),
    ("the the", "the"),
    ("no ", "\n"),
    (" ", "x"),
]


@cache
def tokenizer_of(kind: str, single: str = "<s> $A") -> Tokenizer:
    return Tokenizer(spaced_tokenizer(kind, single), special_tokens=NAMES)


@cache
def transformers_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=spaced_tokenizer(kind, ""), **NAMES)


def reference(kind: str, prompt: str, continuation: str, *, head: list[int]) -> tuple[int, list[int]]:
    """How many of the prompt's tokens both have in common, and what follows, by transformers' tokenizer."""
    hf = transformers_tokenizer(kind)
    alone, whole = (head + hf(text).input_ids for text in (prompt, prompt + continuation))
    common = 0
    while common < min(len(alone), len(whole)) and alone[common] == whole[common]:
        common += 1
    return common, whole[common:]


def assert_as_one_text(kind: str, prompt: str, continuation: str) -> None:
    tokenizer = tokenizer_of(kind)
    head = [] if prompt.startswith("<s>") else [1]
    num_common, behind = reference(kind, prompt, continuation, head=head)
    asked = tokenizer.prompt(prompt)
    if not behind:  # it vanished, or became part of an unknown token
        try:
            found = asked.followed_by(continuation)
        except FieldInvalidError:
            return
        assert found == Continuation(num_common - 1, asked.token_ids[num_common - 1 :])
    else:
        assert asked.followed_by(continuation) == Continuation(num_common, tuple(behind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "continuation"), PAIRS)
def test_a_continuation_is_what_the_whole_text_has_behind_the_prompt(
    kind: str, prompt: str, continuation: str
) -> None:
    assert_as_one_text(kind, prompt, continuation)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(prompt=TEXTS, continuation=TEXTS)
def test_any_text_behind_any_other_is_split_as_the_whole(kind: str, prompt: str, continuation: str) -> None:
    assert_as_one_text(kind, prompt, continuation)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=200, max_size=400),
    continuation=TEXTS,
    gap=st.sampled_from(["", " "]),
)
def test_a_long_prompt_is_split_as_the_whole_though_only_its_end_is_tokenized_again(
    kind: str, words: list[str], continuation: str, gap: str
) -> None:
    assert_as_one_text(kind, gap.join(words) or "x", continuation)


def test_a_continuation_that_runs_into_the_prompt_takes_its_last_token() -> None:
    tokenizer = tokenizer_of("bpe-prepend")
    prompt = tokenizer.prompt("It is Par")
    whole = tokenizer.prompt("It is Paris").token_ids
    found = prompt.followed_by("is")
    assert found.num_prompt_tokens < len(prompt.token_ids)
    assert (*prompt.token_ids[: found.num_prompt_tokens], *found.token_ids) == whole


def test_a_prompt_that_runs_whole_into_its_continuation_is_refused() -> None:
    tokenizer = tokenizer_of("bpe-metaspace-never", "")
    backend = spaced_tokenizer("bpe-metaspace-never", "")
    whole = next(
        piece
        for piece in sorted(backend.get_vocab())
        if piece.isalpha() and [len(backend.encode(text).ids) for text in (piece, piece[:-1])] == [1, 1]
    )
    with pytest.raises(FieldInvalidError, match="nothing is left before it"):
        tokenizer.prompt(whole[:-1]).followed_by(whole[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["Paris", " Paris", "x):", ".", "42", " the", "yes"])
def test_behind_tokens_without_a_text_no_space_is_put_ahead(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    anywhere = tokenizer.prompt("It is.").followed_by(text)
    if anywhere.num_prompt_tokens == len(tokenizer.prompt("It is.").token_ids):
        assert tokenizer.followed_by(text) == anywhere.token_ids


@settings(max_examples=50, deadline=None)
@given(prompt=st.text(min_size=1, max_size=20), continuation=st.text(min_size=1, max_size=20))
def test_a_byte_level_continuation_is_tokenized_by_itself(prompt: str, continuation: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), special_tokens={})
    asked = tokenizer.prompt(prompt)
    alone = tuple(tokenizer.encode(continuation, add_special_tokens=False))
    assert asked.followed_by(continuation) == Continuation(len(asked.token_ids), alone)
    assert tokenizer.followed_by(continuation) == alone


def test_a_byte_level_tokenizer_that_puts_a_space_ahead_is_split_as_one_text() -> None:
    backend = tiny_tokenizer()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = Tokenizer(backend, special_tokens={})
    space, x = (tokenizer.prompt(text).token_ids[-1] for text in ("a ", "x"))
    assert tokenizer.prompt("a").followed_by("x").token_ids == (x,)
    assert tokenizer.prompt("a").followed_by(" x").token_ids == (space, x)


@pytest.mark.parametrize(
    ("single", "head"),
    [
        ("<s> $A", (1,)),
        ("<s> $A </s>", (1,)),
        ("$A </s>", ()),
        ("<s> </s> $A <unk>", (1, 2)),
        ("$A", ()),
        ("", ()),
    ],
)
@pytest.mark.parametrize("text", ["It is", "the answer", "x", ".", "10", "fox\n", " no", "a</s>b"])
def test_a_prompt_has_what_stands_ahead_of_a_text_once_and_nothing_behind_it(
    single: str, head: tuple[int, ...], text: str
) -> None:
    tokenizer = tokenizer_of("bpe-metaspace-first", single)
    own = tuple(spaced_tokenizer("bpe-metaspace-first", "").encode(text).ids)
    assert tokenizer.prompt(text).token_ids == head + own
    rendered = "".join(("<unk>", "<s>", "</s>")[token] for token in head) + text
    assert tokenizer.prompt(rendered).token_ids[: len(head) + 1].count(1) == head.count(1)
    assert tokenizer.prompt(text, add_special_tokens=False).token_ids == own


def test_a_rendered_beginning_is_not_put_ahead_again() -> None:
    backend: Backend = tiny_tokenizer()
    backend.post_processor = TemplateProcessing(
        single=f"{SPECIAL_TOKENS[0]} {SPECIAL_TOKENS[1]} $A",
        special_tokens=[(SPECIAL_TOKENS[0], 0), (SPECIAL_TOKENS[1], 1)],
    )
    tokenizer = Tokenizer(backend, special_tokens={})
    plain = tokenizer.prompt("hi").token_ids
    assert plain[:2] == (0, 1)
    for rendered in ("<|im_start|>hi", "<|endoftext|><|im_start|>hi"):
        assert tokenizer.prompt(rendered).token_ids == plain


def test_a_chat_prompt_is_continued_behind_its_rendering() -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' }}"
    )
    tokenizer = Tokenizer(
        spaced_tokenizer("bpe-metaspace-first"), special_tokens=NAMES, chat_template=template
    )
    prompt = tokenizer.chat_prompt([ChatMessage("user", "the capital?")])
    rendered = "<|user|>\nthe capital?</s>\n<|assistant|>\n"
    num_common, behind = reference("bpe-metaspace-first", rendered, "Paris", head=[])
    assert prompt.followed_by("Paris") == Continuation(num_common, tuple(behind))
    assert 1 not in prompt.token_ids


def test_what_is_scored_together_shares_what_all_leave_of_the_prompt() -> None:
    tokens = score_tokens(
        (1, 2, 3, 4), [Continuation(4, (5,)), Continuation(2, (6, 7)), Continuation(3, (8,))]
    )
    assert tokens.prompt_token_ids == (1, 2)
    assert tokens.continuations == ((3, 4, 5), (6, 7), (3, 8))
    assert tokens.num_given == (2, 0, 1)
