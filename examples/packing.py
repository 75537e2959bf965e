"""Several examples in one row: a shared beginning once, then each example, which sees itself and the beginning.

Packed so, no position is padding and the chat template's head is computed once per batch; every example has
the positions and the context it has when it is served alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.tasks.task import Item
from manyhats.engine.tokenizer import ChatMessage, Tokenizer


@dataclass(frozen=True, slots=True)
class TokenizedItem:
    """Token ids of a chat prompt as the server renders it, and of the answer with the end of turn."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One row of T tokens.

    Attributes:
        token_ids: [1, T] int64.
        positions: [1, T] int64; each example's go on from the shared beginning.
        mask: [1, 1, T, T] bool; entry (q, k) says whether token q attends to token k.
        predictors: [A] int64; the places whose next token is an answer's.
        targets: [A] int64; those next tokens.
    """

    token_ids: Tensor
    positions: Tensor
    mask: Tensor
    predictors: Tensor
    targets: Tensor


def tokenize(item: Item, tokenizer: Tokenizer, end_of_turn: int) -> TokenizedItem:
    """The item as one user message and the assistant's turn."""
    prompt = tokenizer.encode_chat([ChatMessage("user", item.message)])
    answer = tokenizer.encode(item.answer, add_special_tokens=False)
    return TokenizedItem(tuple(prompt), (*answer, end_of_turn))


def pack(items: Sequence[TokenizedItem]) -> PackedBatch:
    """Pack at least one item into a row."""
    shared = _common_length([item.prompt for item in items])
    token_ids = list(items[0].prompt[:shared])
    positions = list(range(shared))
    owners = [0] * shared
    predictors: list[int] = []
    for owner, item in enumerate(items, start=1):
        begin = len(token_ids)
        own = (*item.prompt[shared:], *item.answer)
        token_ids += own
        positions += range(shared, shared + len(own))
        owners += [owner] * len(own)
        first_target = begin + len(item.prompt) - shared
        predictors += range(first_target - 1, begin + len(own) - 1)
    owner_ids = torch.tensor(owners)
    is_visible = (owner_ids[None, :] == owner_ids[:, None]) | (owner_ids[None, :] == 0)
    ids = torch.tensor(token_ids)
    places = torch.tensor(predictors)
    return PackedBatch(
        token_ids=ids[None],
        positions=torch.tensor(positions)[None],
        mask=is_visible.tril()[None, None],
        predictors=places,
        targets=ids[places + 1],
    )


def _common_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many first tokens all prompts share, leaving each at least one of its own."""
    limit = min(len(prompt) for prompt in prompts) - 1
    first = prompts[0]
    for index in range(limit):
        if any(prompt[index] != first[index] for prompt in prompts):
            return index
    return limit
