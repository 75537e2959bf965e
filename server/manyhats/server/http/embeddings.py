"""Vectors of texts: OpenAI's route, and that of Text Embeddings Inference (TEI)."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Raw, Struct, json

from manyhats.server.http.call import HttpCall
from manyhats.server.http.inputs import Input, RightOnly, as_prompts, several
from manyhats.server.http.models import note_model
from manyhats.server.service.encodings import Encodings
from manyhats.server.service.gate import Gate
from manyhats.server.service.prompts import check_num_inputs
from manyhats.server.service.text_threads import paced

if TYPE_CHECKING:
    from manyhats.server.observability.metrics import Metrics
    from manyhats.server.service.readings import Vector

_FLOATS = 16  # written in the time that a character takes to tokenize

Dimensions = Annotated[int, Meta(ge=1)]


class EmbeddingsBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/embeddings``: a text or its token ids, or several."""

    model: str | None = None
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    user: Any = None


class Embedding(Struct, kw_only=True):
    """The vector of one text; in base64, its little-endian float32."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Struct):
    """Tokens of all texts, special ones included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, kw_only=True):
    """The vectors of texts, in order."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class EmbedBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /embed``: a text or its token ids, or several, in TEI's form."""

    model: str | None = None
    inputs: Input
    truncate: bool | None = None
    truncation_direction: RightOnly | None = None
    normalize: bool | None = None
    dimensions: Dimensions | None = None
    prompt_name: None = None


class Vectors:
    """Makes vectors on the backend behind the gate."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def embeddings(self, call: HttpCall, body: EmbeddingsBody) -> EmbeddingList:
        """``POST /v1/embeddings``."""
        model = note_model(call, self._gate.backend, body.model, body.request_id)
        given = several(body.input)
        check_num_inputs(len(given))
        prompts = as_prompts(given, "input", add_special_tokens=body.add_special_tokens is not False)
        found = await self._encodings.embed(
            call,
            prompts,
            dimensions=body.dimensions or 0,
            cache_salt=body.cache_salt or "",
            priority=-(body.priority or 0),
        )
        call.show_version()
        write = _base64 if body.encoding_format == "base64" else _written
        return EmbeddingList(
            data=[
                Embedding(index=index, embedding=each)
                for index, each in enumerate(await self._each(write, found.vectors))
            ],
            model=model,
            usage=EmbeddingUsage(found.usage.prompt_tokens, found.usage.prompt_tokens),
        )

    async def embed(self, call: HttpCall, body: EmbedBody) -> list[list[float]]:
        """``POST /embed``."""
        note_model(call, self._gate.backend, body.model, reads_header=True)
        given = several(body.inputs)
        check_num_inputs(len(given))
        found = await self._encodings.embed(
            call,
            as_prompts(given, "inputs"),
            normalize=body.normalize is not False,
            dimensions=body.dimensions or 0,
            truncates=bool(body.truncate),
        )
        call.show_version()
        return await self._each(_written, found.vectors)

    async def _each(self, write: Callable[[Vector], Any], vectors: Sequence[Vector]) -> list[Any]:
        """What ``write`` makes of each vector; of many, off the event loop."""
        length = sum(vector.size for vector in vectors) // _FLOATS
        return await self._gate.backend.text_threads.run(partial(_all, write, vectors), length)

    @property
    def _encodings(self) -> Encodings:
        return Encodings(self._gate.backend, self._metrics)


def _all(write: Callable[[Vector], Any], vectors: Sequence[Vector]) -> list[Any]:
    return [write(vector) for vector in paced(vectors, lambda vector: vector.size // _FLOATS)]


def _written(vector: Vector) -> Raw:
    """A vector in JSON, so that the event loop has only to copy it."""
    return Raw(json.encode(vector.tolist()))


def _base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
