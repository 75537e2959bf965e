"""Everything that answers requests, as the server holds it once the model is loaded."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.server.service.store_health import StoreHealth
from manyhats.server.service.text_threads import TextThreads

if TYPE_CHECKING:
    from manyhats.adapters.store.store import AdapterStore
    from manyhats.engine.engine import Engine
    from manyhats.engine.text.tokenizer import Tokenizer
    from manyhats.server.service.task_tokenizers import TaskTokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The resident base model, as callers see it.

    Attributes:
        names: all that it is known by.
        kind: what it does with a text by itself.
        embedding_size: of a text's vector.
        pooling: of texts' hidden values, unless a task or a request says otherwise.
    """

    name: str
    digest: str
    quantization: str
    dtype: str
    device: str
    vocab_size: int
    names: frozenset[str] = frozenset()
    kind: TaskKind = TaskKind.GENERATE
    embedding_size: int = 0
    pooling: Pooling = Pooling.LAST

    @property
    def attention(self) -> str:
        """What its tokens attend to: those before them (``causal``), or all (``bidirectional``)."""
        return "causal" if self.kind is TaskKind.GENERATE else "bidirectional"

    @property
    def services(self) -> tuple[str, ...]:
        """Full names of the API's services that answer on it."""
        own = ("Generation",) if self.kind is TaskKind.GENERATE else ()
        return tuple(f"manyhats.v1.{name}Service" for name in (*own, "Encoding", "Adapter", "Server"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """The most a caller may request; see ``ServeConfig``. None for no limit."""

    max_sequences: int
    max_waiting: int
    max_adapters: int
    max_artifact_bytes: int
    max_adapter_rank: int
    max_virtual_tokens: int
    max_parts: int
    max_transfers: int
    max_tasks: int | None
    max_versions_per_task: int | None
    max_bytes_per_task: int | None
    max_bytes: int | None

    def shown(self) -> dict[str, int | None]:
        """As messages can hold them: numbers in 32 bits, bytes in 64; larger ones have no effect anyway."""
        return {
            name: None if value is None else min(value, 2**64 - 1 if "bytes" in name else 2**32 - 1)
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Everything that answers requests once the model is loaded.

    Attributes:
        store_health: what the store can be used for.
        store_threads: for work that blocks on the store; None for the event loop's own.
        text_threads: for work that takes time in proportion to a text.
        task_tokenizers: of tasks that read and write text differently; None if no task can.
    """

    engine: Engine
    store: AdapterStore
    tokenizer: Tokenizer
    info: ModelInfo
    limits: ServerLimits
    store_health: StoreHealth = field(default_factory=StoreHealth)
    store_threads: Executor | None = None
    text_threads: TextThreads = field(default_factory=TextThreads)
    task_tokenizers: TaskTokenizers | None = None
