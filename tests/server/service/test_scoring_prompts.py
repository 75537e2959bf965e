"""Score tokenizes prompt and continuations as one text each, on tokenizers where that matters."""

from __future__ import annotations

import pytest

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.text.prompt_text import ScoreTokens
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.server.grpc import from_proto
from manyhats.server.service.prompts import Encoder
from manyhats.server.service.text_threads import TextThreads
from manyhats.v1.generation_pb2 import Continuation, ScoreRequest, TokenIds
from support.factories.spaced_tokenizers import KINDS, spaced_tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def encoder_of(kind: str, single: str = "<s> $A") -> Encoder:
    tokenizer = Tokenizer(spaced_tokenizer(kind, single), special_tokens=NAMES)
    return Encoder(tokenizer, TextThreads(), tokenizer.vocab_size)


async def scored(encoder: Encoder, request: ScoreRequest) -> ScoreTokens:
    return await encoder.encode_scoring(from_proto.prompt(request), from_proto.continuations(request))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
async def test_each_continuation_with_what_is_ahead_of_it_is_the_whole_text(kind: str, single: str) -> None:
    texts = [" Paris", ".", "is", "x):", "\n", "10", " no", "ris", "</s>"]
    request = ScoreRequest(text="It is Pa", continuations=[Continuation(text=text) for text in texts])
    tokens = await scored(encoder_of(kind, single), request)
    for text, continuation, num_given in zip(texts, tokens.continuations, tokens.num_given, strict=True):
        whole = (1, *spaced_tokenizer(kind, "").encode(f"It is Pa{text}").ids)
        assert tokens.prompt_token_ids + continuation == whole
        assert 0 <= num_given < len(continuation)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_score_does_not_depend_on_what_is_scored_beside_it(kind: str) -> None:
    encoder = encoder_of(kind)
    texts = [" Paris", "is", "ris", "."]
    request = ScoreRequest(text="It is Pa", continuations=[Continuation(text=text) for text in texts])
    together = await scored(encoder, request)
    for index, text in enumerate(texts):
        alone = await scored(encoder, ScoreRequest(text="It is Pa", continuations=[Continuation(text=text)]))
        given = together.num_given[index]
        assert alone.continuations[0] == together.continuations[index][given:]
        assert alone.prompt_token_ids == together.prompt_token_ids + together.continuations[index][:given]


async def test_tokens_stay_as_they_are() -> None:
    encoder = encoder_of("bpe-prepend")
    request = ScoreRequest(
        token_ids=TokenIds(ids=[5, 6]),
        continuations=[Continuation(token_ids=TokenIds(ids=[7])), Continuation(text="x")],
    )
    tokens = await scored(encoder, request)
    assert tokens.prompt_token_ids == (5, 6)
    assert tokens.continuations[0] == (7,)
    assert tokens.continuations[1] == encoder.tokenizer.prompt("a").followed_by("x").token_ids


async def test_a_continuation_without_tokens_is_named() -> None:
    encoder = encoder_of("bpe-prepend", "")
    request = ScoreRequest(text="a", continuations=[Continuation(token_ids=TokenIds(ids=[9999]))])
    with pytest.raises(FieldInvalidError) as caught:
        await scored(encoder, request)
    assert caught.value.field == "continuations[0].token_ids.ids"


@pytest.mark.parametrize("text", ["It is", "<s>It is"])
async def test_a_text_prompt_begins_once_and_does_not_end(text: str) -> None:
    encoder = encoder_of("bpe-metaspace-first", "<s> $A </s>")
    ids = await encoder.encode(from_proto.prompt(ScoreRequest(text=text)))
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert 2 not in ids
