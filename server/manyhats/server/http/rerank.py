"""How relevant texts are to a query: the form of Jina and Cohere, and that of Text Embeddings Inference (TEI)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from manyhats.engine.errors import FieldInvalidError, RequestError
from manyhats.server.http.call import HttpCall
from manyhats.server.http.inputs import RightOnly
from manyhats.server.http.models import note_model
from manyhats.server.http.openai_answers import Spent, UsageBody
from manyhats.server.service.encodings import Encodings
from manyhats.server.service.gate import Gate
from manyhats.server.service.prompts import check_num_inputs

if TYPE_CHECKING:
    from manyhats.server.observability.metrics import Metrics

# The field that tells a form apart → fields of that form alone.
_FORMS = {
    "documents": ("top_n", "return_documents"),
    "texts": ("raw_scores", "return_text", "truncate", "truncation_direction"),
}


class Document(Struct, forbid_unknown_fields=True):
    """A document that has nothing but a text."""

    text: str


class RerankBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/rerank``: a query, and either ``documents`` or, in TEI's form, ``texts``."""

    model: str | None = None
    query: str
    documents: list[str | Document] | None = None
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None
    texts: list[str] | None = None
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    truncation_direction: RightOnly | None = None
    priority: int | None = None
    request_id: str | None = None
    user: Any = None

    def __post_init__(self) -> None:
        if (self.documents is None) == (self.texts is None):
            raise FieldInvalidError("documents", "exactly one of documents and texts must be given")
        form, other = ("texts", "documents") if self.documents is None else ("documents", "texts")
        for field in _FORMS[other]:
            if getattr(self, field) is not None:
                raise FieldInvalidError(field, f"comes with {other}, not with {form}")


class RankedDocument(Struct):
    """A document's place in the request, and how relevant it is: from 0 to 1."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class RankedText(Struct):
    """The same in TEI's form."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class RerankAnswer(Struct, kw_only=True):
    """The documents that are asked for, most relevant first."""

    id: str
    object: str = "list"
    model: str
    results: list[RankedDocument]
    usage: UsageBody


class Reranking:
    """Ranks on the backend behind the gate."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def rerank(self, call: HttpCall, body: RerankBody) -> RerankAnswer | list[RankedText]:
        """``POST /v1/rerank`` and ``/rerank``."""
        model = note_model(call, self._gate.backend, body.model, body.request_id, reads_header=True)
        texts = body.texts
        if texts is None:
            texts = [each.text if isinstance(each, Document) else each for each in body.documents or ()]
        with _own_names("documents" if body.texts is None else "texts"):
            check_num_inputs(len(texts), "texts")
            found = await self._encodings.rerank(
                call,
                body.query,
                texts,
                raw_scores=bool(body.raw_scores),
                top_n=body.top_n or 0,
                truncates=bool(body.truncate),
                priority=-(body.priority or 0),
            )
        call.show_version()
        if body.texts is not None:
            return _ranked_texts(found.results, body.texts if body.return_text else None)
        spent = Spent()
        spent.prompt(found.usage)
        return RerankAnswer(
            id=f"rerank-{call.request_id}",
            model=model,
            results=_ranked_documents(found.results, texts if body.return_documents else None),
            usage=spent.body,
        )

    @property
    def _encodings(self) -> Encodings:
        return Encodings(self._gate.backend, self._metrics)


def _ranked_documents(
    ranked: Sequence[tuple[int, float]], texts: Sequence[str] | None
) -> list[RankedDocument]:
    return [
        RankedDocument(index, score, UNSET if texts is None else Document(texts[index]))
        for index, score in ranked
    ]


def _ranked_texts(ranked: Sequence[tuple[int, float]], texts: Sequence[str] | None) -> list[RankedText]:
    return [RankedText(index, score, UNSET if texts is None else texts[index]) for index, score in ranked]


@contextmanager
def _own_names(field: str) -> Iterator[None]:
    """Call the field of an error as the request does."""
    try:
        yield
    except RequestError as error:
        error.renamed(re.sub(r"^(?:inputs|texts)\b", field, error.field))
        raise
