"""Training data: read from files, tokenized as the server does, and batched."""

from __future__ import annotations

from manyhats.trainer.data.batch import collate
from manyhats.trainer.data.contents import Prompted, checked_contents
from manyhats.trainer.data.dataset import DataCounts, Dataset, LabelTokens, TokenizedRows
from manyhats.trainer.data.ending import Ends, find_ends
from manyhats.trainer.data.labels import LabelledItem, check_label, find_labels, labelled_items
from manyhats.trainer.data.reading import read_rows
from manyhats.trainer.data.row import Row
from manyhats.trainer.data.sampler import BatchSampler, evaluation_batches
from manyhats.trainer.data.tokenization import Tokenization, tokenize_rows

__all__ = [
    "BatchSampler",
    "DataCounts",
    "Dataset",
    "Ends",
    "LabelTokens",
    "LabelledItem",
    "Prompted",
    "Row",
    "Tokenization",
    "TokenizedRows",
    "check_label",
    "checked_contents",
    "collate",
    "evaluation_batches",
    "find_ends",
    "find_labels",
    "labelled_items",
    "read_rows",
    "tokenize_rows",
]
