"""The data: read from files, tokenized as the server tokenizes, and put into batches."""

from __future__ import annotations

from manyhats.trainer.data.collation import collate
from manyhats.trainer.data.dataset import Dataset, TokenizedRows
from manyhats.trainer.data.ending import choose_eos_token_id
from manyhats.trainer.data.labels import LabelledItem, find_labels, label_token_ids, labelled_items
from manyhats.trainer.data.reading import read_rows
from manyhats.trainer.data.row import Row
from manyhats.trainer.data.sampler import BatchSampler, evaluation_batches
from manyhats.trainer.data.tokenization import tokenize_rows

__all__ = [
    "BatchSampler",
    "Dataset",
    "LabelledItem",
    "Row",
    "TokenizedRows",
    "choose_eos_token_id",
    "collate",
    "evaluation_batches",
    "find_labels",
    "label_token_ids",
    "labelled_items",
    "read_rows",
    "tokenize_rows",
]
