"""An answer's text is what transformers' tokenizer decodes of its tokens, whatever the decoder rewrites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
from transformers import AutoTokenizer

from manyhats.engine.request import ResponseOptions, StoppingParams
from support.factories.saying_model import make_saying_checkpoint
from support.harnesses.engine import collect, load_tiny, make_request, running_engine

TOKENS = (
    "it",
    "▁it",
    "'",
    "s",
    "▁",
    "a</w>",
    "##b",
    "<pad>",
    "aa",
    "<0xE2>",
    "<0x82>",
    "<0xAC>",
    ",",
    ".",
    " ",
    "n't",
    "▁x y ",
)
SPECIAL = ("<s>", "</s>")
DECODERS: dict[str, Any] = {
    "none": None,
    "Metaspace": decoders.Metaspace(),
    "WordPiece": decoders.WordPiece("##", cleanup=True),
    "BPEDecoder": decoders.BPEDecoder("</w>"),
    "CTC": decoders.CTC("<pad>", "▁", cleanup=True),
    "Replace behind Fuse": decoders.Sequence([decoders.Fuse(), decoders.Replace("'s", "'S")]),
    "bytes and words": decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.BPEDecoder("</w>")]
    ),
    "a pattern at the end": decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(r"\S+$"), "end")]),
}


def tokenizer_with(decoder: Any) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *TOKENS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="it"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.decoder = decoder
    return tokenizer


@pytest.mark.parametrize(
    ("name", "cleans_up"),
    [*((name, False) for name in sorted(DECODERS)), ("WordPiece", True), ("Metaspace", True)],
)
async def test_a_streamed_answer_is_the_whole_decode(tmp_path: Path, name: str, cleans_up: bool) -> None:
    tokenizer = tokenizer_with(DECODERS[name])
    said = list(range(1, len(TOKENS) + len(SPECIAL)))
    make_saying_checkpoint(
        tmp_path, said, tokenizer, clean_up_tokenization_spaces=cleans_up, eos_token="</s>"
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    async with running_engine(load_tiny(tmp_path)) as engine:
        for num_tokens in (1, 5, 13, len(said)):
            for skips in (True, False):
                stopping = StoppingParams(max_new_tokens=num_tokens, ignore_eos=True)
                response = ResponseOptions(skip_special_tokens=skips)
                answer = await collect(engine, make_request([0], stopping=stopping, response=response))
                assert answer.text == theirs.decode(answer.token_ids, skip_special_tokens=skips)
