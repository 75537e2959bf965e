"""Texts that are cut have the tokens that the library's own truncation leaves, special ones included."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from manyhats.engine.errors import PromptTooLongError
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.tiny_models import tiny_tokenizer

BEGIN, END = ("<|im_start|>", 1), ("<|endoftext|>", 0)
PROCESSORS = {
    "none": None,
    "bytes": processors.ByteLevel(trim_offsets=True),
    "ends": processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>",
        pair="<|im_start|> $A <|endoftext|> $B:1 <|endoftext|>:1",
        special_tokens=[BEGIN, END],
    ),
    "begins": processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A <|im_start|> $B:1", special_tokens=[BEGIN]
    ),
    "bert": processors.BertProcessing(END, BEGIN),
    "roberta": processors.RobertaProcessing(END, BEGIN),
    "sequence": processors.Sequence(
        [processors.ByteLevel(), processors.RobertaProcessing(END, BEGIN, add_prefix_space=False)]
    ),
}


def make_backend(name: str) -> Backend:
    backend = tiny_tokenizer()
    if (processor := PROCESSORS[name]) is not None:
        backend.post_processor = processor
    return backend


OURS = {name: Tokenizer(make_backend(name), special_tokens={}) for name in PROCESSORS}
THEIRS = {name: make_backend(name) for name in PROCESSORS}


@pytest.mark.parametrize("name", PROCESSORS)
@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    text=st.text(max_size=12),
    first=st.none() | st.text(max_size=12),
    max_tokens=st.integers(5, 30),
    add_special_tokens=st.booleans(),
)
def test_a_cut_is_the_librarys(
    name: str, text: str, first: str | None, max_tokens: int, add_special_tokens: bool
) -> None:
    THEIRS[name].enable_truncation(max_tokens)
    pair = (text,) if first is None else (first, text)
    wanted = THEIRS[name].encode(*pair, add_special_tokens=add_special_tokens)
    found = OURS[name].read(
        text, add_special_tokens=add_special_tokens, max_tokens=max_tokens, first=first, truncates=True
    )
    assert found.token_ids == tuple(wanted.ids)
    assert found.token_types == (() if first is None else tuple(wanted.type_ids))


def test_special_tokens_must_leave_room() -> None:
    (one,) = OURS["none"].encode("a", add_special_tokens=True)
    ends = OURS["ends"]
    assert ends.read("abc", add_special_tokens=True, max_tokens=3, truncates=True).token_ids == (1, one, 0)
    for truncates, max_tokens in ((True, 2), (False, 3)):
        with pytest.raises(PromptTooLongError):
            ends.read("abc", add_special_tokens=True, max_tokens=max_tokens, truncates=truncates)


def test_long_pairs_take_no_longer_than_their_tokens() -> None:
    begin_s = time.monotonic()
    for name in PROCESSORS:
        found = OURS[name].read(
            "a " * 50_000, add_special_tokens=True, max_tokens=8, first="b " * 50_000, truncates=True
        )
        assert len(found.token_ids) == 8
    assert time.monotonic() - begin_s < 30  # piece by piece it would not end
