"""Rows of training data as the tiny tokenizer has them, and what of them is learned."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from manyhats.engine.text.ending import find_ends
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.trainer.data.batch import TokenizedRow
from manyhats.trainer.data.dataset import Dataset
from manyhats.trainer.data.row import Row
from manyhats.trainer.data.tokenization import Tokenization, tokenize_rows
from manyhats.trainer.settings.settings import DataSettings
from support.factories.tiny_models import CHAT_TEMPLATE, EOS_TOKEN_ID, SPECIAL_TOKENS, tiny_tokenizer

NAMES = {"bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[2]}


def tokenizer_of(
    single: str = "", template: str | None = CHAT_TEMPLATE, backend: Backend | None = None
) -> Tokenizer:
    """The tiny tokenizer, which puts what ``single`` says around a text."""
    backend = backend or tiny_tokenizer()
    if single:
        ids = [(token, index) for index, token in enumerate(SPECIAL_TOKENS) if token in single]
        backend.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    return Tokenizer(backend, special_tokens=NAMES, chat_template=template)


TOKENIZER = tokenizer_of()


def tokenized(
    rows: Sequence[Row] | Sequence[Mapping[str, object]],
    tokenizer: Tokenizer = TOKENIZER,
    *,
    eos_token_ids: frozenset[int] = frozenset({EOS_TOKEN_ID}),
    labels: Sequence[str] = (),
    max_length: int = 100_000,
    vocab_size: int | None = None,
    **options: Any,
) -> Dataset:
    """Rows, by their fields those of ``data.jsonl``; ``options`` are of ``DataSettings``."""
    made = [
        row if isinstance(row, Row) else Row(row, "data.jsonl", index + 1) for index, row in enumerate(rows)
    ]
    how = Tokenization(
        tokenizer=tokenizer,
        ends=find_ends(tokenizer, eos_token_ids),
        settings=DataSettings(train="data.jsonl", **options),
        max_length=max_length,
        vocab_size=vocab_size or tokenizer.vocab_size,
    )
    return tokenize_rows(made, how, labels)


def text_of(token_ids: Sequence[int], tokenizer: Tokenizer = TOKENIZER) -> str:
    return "".join(tokenizer.piece(token_id) for token_id in token_ids)


def learned(row: TokenizedRow, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    """The text of each run of targets."""
    runs = itertools.groupby(zip(row.token_ids, row.is_target, strict=True), lambda each: each[1])
    return [text_of([token_id for token_id, _ in run], tokenizer) for is_target, run in runs if is_target]
