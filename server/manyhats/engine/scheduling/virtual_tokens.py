"""Virtual tokens: one set of KV blocks serves every sequence of a task, for as long as there is room."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manyhats.adapters.primitives import KVPrefix, PromptEmbeddings
from manyhats.engine.scheduling.blocks import SharedPrefix

if TYPE_CHECKING:
    from torch import Tensor

PLACEHOLDER_ID = 0
"""Placeholder for a virtual token in a sequence's token ids; it is never looked up."""


@dataclass(slots=True, eq=False)
class VirtualTokens:
    """The virtual tokens of a loaded adapter.

    A sequence finds their keys and values in held blocks, or else puts them into its own: stored ones are copied there,
    embeddings are run. They are entitled to nothing in the pool, so a waiting request keeps no blocks.

    Attributes:
        source: stored keys and values, or embeddings.
        held: blocks that have them now; only the scheduler changes it.
        embeddings: [P, D] float32, used for the first P tokens instead of their ids' embeddings; None for stored ones.
    """

    source: KVPrefix | PromptEmbeddings
    held: SharedPrefix | None = field(default=None, init=False)
    embeddings: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.source, PromptEmbeddings):
            self.embeddings = self.source.embeddings.float()

    @property
    def num_tokens(self) -> int:
        """P."""
        return self.source.num_virtual_tokens

    @property
    def position_offset(self) -> int:
        """Real token t has position ``P + t + position_offset``."""
        return self.source.position_offset

    @property
    def are_normed(self) -> bool:
        """Whether the embeddings enter behind the norm of an encoder's."""
        return isinstance(self.source, PromptEmbeddings) and self.source.are_normed

    @property
    def are_read(self) -> bool:
        """Whether what reads a text's first row reads the first of them."""
        return isinstance(self.source, PromptEmbeddings) and self.source.are_read

    @property
    def num_bytes(self) -> int:
        """In memory, not counting the pool's blocks."""
        if isinstance(self.source, KVPrefix):
            return self.source.keys.nbytes + self.source.values.nbytes
        return 0 if self.embeddings is None else self.embeddings.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class PrefixFill:
    """Stored keys and values of virtual tokens first_token … P − 1, to be copied to the blocks from there on."""

    virtual: VirtualTokens
    first_token: int
    block_ids: tuple[int, ...]
