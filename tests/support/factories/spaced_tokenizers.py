"""Tokenizers that are not byte-level, trained on the spot: each kind of dummy prefix, on BPE and Unigram models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

MARK = "\N{LOWER ONE EIGHTH BLOCK}"
SPECIALS = ("<unk>", "<s>", "</s>")
_TEXT = [
    "It is Paris. The capital of France is Paris, not Rome!",
    "def f(x):\n    return x + 12 - 3 * 4\n",
    "the quick brown fox jumps over the lazy dog; the answer is 42",
    "one two three four five six seven eight nine ten eleven twelve",
    "user assistant system yes no maybe true false 10 100 1000",
] * 4


def _prepended(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])


def _replaced(tokenizer: Tokenizer) -> None:
    """As Gemma's: a mark for each space, and none ahead of a text."""
    tokenizer.normalizer = normalizers.Replace(" ", MARK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")


def _metaspaced(scheme: str, *, split: bool) -> Callable[[Tokenizer], None]:
    def apply(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme=scheme, split=split)

    return apply


_BEGINNINGS: Mapping[str, Callable[[Tokenizer], None]] = {
    "prepend": _prepended,
    "replace": _replaced,
    **{
        f"metaspace-{scheme}{'-split' if split else ''}": _metaspaced(scheme, split=split)
        for scheme in ("first", "always", "never")
        for split in (False, True)
    },
}
KINDS = tuple(f"{model}-{beginning}" for model in ("bpe", "unigram") for beginning in _BEGINNINGS)


def spaced_tokenizer(kind: str, single: str = "<s> $A") -> Tokenizer:
    """The tokenizer of a kind, such as ``bpe-prepend``, with a post-processor's template; empty for none."""
    tokenizer = Tokenizer.from_str(_trained(kind))
    if single:
        ids = [(token, SPECIALS.index(token)) for token in SPECIALS if token in single]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


@cache
def _trained(kind: str) -> str:
    """As ``tokenizer.json``; once, because ties between pieces are broken at random."""
    model, _, beginning = kind.partition("-")
    tokenizer: Any
    trainer: Any
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=list(SPECIALS), show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=160, special_tokens=list(SPECIALS), unk_token="<unk>", show_progress=False
        )
    _BEGINNINGS[beginning](tokenizer)
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return str(tokenizer.to_str())
