"""The task that a call names: its version, its tokenizer, and how its texts become tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from manyhats.adapters.heads import TaskKind
from manyhats.adapters.limits import MAX_ADDED_TOKENS
from manyhats.server.service.errors import TaskKindError
from manyhats.server.service.prompts import Encoder

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.engine.text.tokenizer import Tokenizer
    from manyhats.server.service.backend import Backend
    from manyhats.server.service.call import Call


class Tasks:
    """What calls need of their task.

    Args:
        backend: its store and tokenizers.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def resolved(self, call: Call) -> AdapterRecord | None:
        """The version that a call names; None for the base model."""
        if call.name and call.version is None:
            call.version = self.version(call.name)
        return call.version

    def version(self, name: str) -> AdapterRecord | None:
        """The version that a task's name stands for; None for the base model, whose name is empty.

        Raises:
            AdapterError: there is none, or it cannot be used.
        """
        return self._backend.store.resolve(name) if name else None

    async def tokenizer_of(self, adapter: AdapterRecord | None) -> Tokenizer | None:
        """The tokenizer of an adapter's task; None for the base's."""
        tokenizers = self._backend.task_tokenizers
        return None if tokenizers is None else await tokenizers.of(adapter)

    def _num_ids(self, tokenizer: Tokenizer | None, adapter: AdapterRecord | None) -> int:
        """The ids that a prompt may hold, as far as the tokenizer tells, or at most if an adapter may add some."""
        num_ids = self._backend.info.vocab_size
        if adapter is not None:
            return num_ids + MAX_ADDED_TOKENS
        return num_ids if tokenizer is None else max(num_ids, tokenizer.vocab_size)

    def encoder(
        self, tokenizer: Tokenizer | None, max_tokens: int, adapter: AdapterRecord | None = None
    ) -> Encoder:
        """Turns texts into tokens.

        Args:
            tokenizer: a task's; None for the base's.
            max_tokens: of a prompt.
            adapter: the engine will run the tokens on; it alone knows which tokens an adapter has rows for.
        """
        tokenizers = self._backend.task_tokenizers
        render = None
        if tokenizers is not None and tokenizer is not None and tokenizer.has_own_template:
            render = partial(tokenizers.render, tokenizer)
        return Encoder(
            tokenizer or self._backend.tokenizer,
            self._backend.text_threads,
            vocab_size=self._num_ids(tokenizer, adapter),
            max_tokens=max_tokens,
            render=render,
        )


def task_id(adapter: AdapterRecord | None) -> str:
    """The task of an adapter; "" for the base model."""
    return "" if adapter is None else adapter.task_id


def check_kind(
    adapter: AdapterRecord | None, *kinds: TaskKind, act: str, base: TaskKind = TaskKind.GENERATE
) -> None:
    """Check that a version, or the base by itself, does what a call asks of it: to ``act``.

    Raises:
        TaskKindError: it does something else.
    """
    own = base if adapter is None else adapter.kind
    if own not in kinds:
        raise TaskKindError("the base model" if adapter is None else adapter.name, own, act)
