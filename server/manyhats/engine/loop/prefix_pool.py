"""The virtual tokens of loaded adapters, on their way into one engine and out of it."""

from __future__ import annotations

from manyhats.adapters.primitives import KVPrefix, PromptEmbeddings
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.loop.thread import Loop
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens


class EnginePrefixPool:
    """A ``PrefixPool`` over one engine; safe from any thread.

    Args:
        loop: of that engine.
        capacity: of its KV cache, in tokens.
    """

    def __init__(self, loop: Loop, capacity: int) -> None:
        self._loop = loop
        self._capacity = capacity

    def add(self, prefix: KVPrefix | PromptEmbeddings) -> VirtualTokens:
        """Virtual tokens for sequences to start with; the first of them puts them into blocks.

        Raises:
            FieldInvalidError: the KV cache cannot hold them and a token behind them.
        """
        if prefix.num_virtual_tokens >= self._capacity:
            raise FieldInvalidError(
                "num_virtual_tokens",
                f"are {prefix.num_virtual_tokens}; the KV cache holds {self._capacity} tokens in all",
            )
        return VirtualTokens(prefix)

    def remove(self, prefix: VirtualTokens) -> None:
        """Has their blocks freed before the next step; no unfinished sequence may have them."""
        self._loop.forget(prefix)
