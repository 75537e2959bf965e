"""``GET /info``: what a server and a task do, in the form of Text Embeddings Inference (TEI)."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from msgspec import Struct

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.engine.request import MAX_INPUTS
from manyhats.server.http.call import HttpCall
from manyhats.server.http.models import note_model
from manyhats.server.service.gate import Gate
from manyhats.server.service.tasks import check_kind

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.server.service.backend import Backend

# TEI's own words; its other poolings are not served, and it has none of the maximum.
_POOLINGS = {Pooling.FIRST: "cls", Pooling.LAST: "last_token", Pooling.MEAN: "mean", Pooling.MAX: "max"}

_KINDS = (TaskKind.GENERATE, TaskKind.EMBED, TaskKind.CLASSIFY)


class PoolingInfo(Struct):
    """How vectors are made."""

    pooling: str


class ClassesInfo(Struct):
    """The classes of a head, by index and by name."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(Struct, omit_defaults=True, kw_only=True):
    """What a task does: one of these."""

    embedding: PoolingInfo | None = None
    classifier: ClassesInfo | None = None
    reranker: ClassesInfo | None = None


class Info(Struct, kw_only=True):
    """A model's name and type, and what a call may ask for."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: ModelType
    max_concurrent_requests: int
    max_input_length: int
    max_client_batch_size: int
    auto_truncate: bool
    version: str


class TeiInfo:
    """Tells of the backend behind the gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def info(self, call: HttpCall, body: None) -> Info:
        """``GET /info``, of the base, or of the task of ``?model=`` or of the header.

        Raises:
            TaskKindError: the task tells of tokens, for which TEI has no word.
            AdapterError: there is no such task.
        """
        backend = self._gate.backend
        models = parse_qs(call.query.decode("ascii", "replace")).get("model", [])
        name = note_model(call, backend, models[-1] if models else None, reads_header=True)
        adapter = backend.store.resolve(call.name) if call.name else None
        check_kind(adapter, *_KINDS, act="embed, classify or rank texts", base=backend.info.kind)
        return Info(
            model_id=name,
            model_sha=backend.info.digest if adapter is None else adapter.digest,
            model_dtype=backend.info.dtype,
            model_type=_type_of(adapter, backend),
            max_concurrent_requests=backend.limits.max_sequences + backend.limits.max_waiting,
            max_input_length=backend.engine.max_context_length,
            max_client_batch_size=MAX_INPUTS,
            auto_truncate=False,
            version=version("manyhats"),
        )


def _type_of(adapter: AdapterRecord | None, backend: Backend) -> ModelType:
    """A classifier, a reranker if it has one class, or else what makes vectors."""
    if adapter is not None and adapter.kind is TaskKind.CLASSIFY:
        names = adapter.class_names
        classes = ClassesInfo(
            {str(index): name for index, name in enumerate(names)},
            {name: index for index, name in enumerate(names)},
        )
        return ModelType(reranker=classes) if len(names) == 1 else ModelType(classifier=classes)
    pooling = None if adapter is None else adapter.pooling
    return ModelType(embedding=PoolingInfo(_POOLINGS[pooling or backend.info.pooling]))
