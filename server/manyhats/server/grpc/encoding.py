"""EncodingService: turns messages into calls of the service, and what it finds into messages."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from manyhats.server.grpc import from_proto, to_proto
from manyhats.server.service.call import Call
from manyhats.server.service.encodings import Encodings
from manyhats.server.service.gate import Gate
from manyhats.v1 import encoding_pb2

if TYPE_CHECKING:
    from manyhats.server.observability.metrics import Metrics


class EncodingService:
    """Reads texts on the backend behind the gate."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def Embed(  # noqa: N802
        self, request: encoding_pb2.EmbedRequest, call: Call
    ) -> encoding_pb2.EmbedResponse:
        """Make a vector of each text."""
        call.identify(request.request_id)
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        found = await self._encodings.embed(
            call,
            from_proto.text_inputs(request.inputs, add_special_tokens=special),
            pooling=from_proto.pooling(request.pooling),
            normalize=request.normalize if request.HasField("normalize") else True,
            dimensions=request.dimensions,
            truncates=from_proto.truncates(request.truncation),
            cache_salt=request.cache_salt,
            priority=request.priority,
        )
        backend = self._gate.backend
        respond = partial(to_proto.embed_response, call.request_id, found, backend.info.digest)
        count = sum(map(len, found.vectors)) // to_proto.VALUES_PER_ENTRY
        return await backend.text_threads.build(respond, count)

    async def Classify(  # noqa: N802
        self, request: encoding_pb2.ClassifyRequest, call: Call
    ) -> encoding_pb2.ClassifyResponse:
        """Tell the class of each text, by each task."""
        call.identify(request.request_id)
        found = await self._encodings.classify_by_each(
            call,
            list(request.task_ids) or [""],
            from_proto.text_inputs(request.inputs),
            raw_scores=request.raw_scores,
            top_k=request.top_k,
            truncates=from_proto.truncates(request.truncation),
            priority=request.priority,
        )
        respond = partial(to_proto.classify_response, call.request_id, found)
        count = sum(len(scored.classes) for each in found for scored in each.results)
        return await self._gate.backend.text_threads.build(respond, count)

    async def ClassifyTokens(  # noqa: N802
        self, request: encoding_pb2.ClassifyTokensRequest, call: Call
    ) -> encoding_pb2.ClassifyTokensResponse:
        """Tell the class of each token, or the entities that they make."""
        call.identify(request.request_id)
        texts = from_proto.plain_texts(request.inputs)
        aggregation = from_proto.aggregation(request.aggregation)
        cuts = from_proto.truncates(request.truncation)
        build = self._gate.backend.text_threads.build
        if aggregation is not None:
            found = await self._encodings.entities(
                call, texts, aggregation, truncates=cuts, priority=request.priority
            )
            count = sum(map(len, found.results))
            return await build(partial(to_proto.entities_response, call.request_id, found), count)
        tagged = await self._encodings.classify_tokens(
            call, texts, top_k=request.top_k, truncates=cuts, priority=request.priority
        )
        count = sum(len(token.scored.classes) for tokens in tagged.results for token in tokens)
        return await build(partial(to_proto.tagged_response, call.request_id, tagged), count)

    async def Rerank(  # noqa: N802
        self, request: encoding_pb2.RerankRequest, call: Call
    ) -> encoding_pb2.RerankResponse:
        """Sort texts by their relevance to a query."""
        call.identify(request.request_id)
        texts = from_proto.reranked(request)
        found = await self._encodings.rerank(
            call,
            request.query,
            texts,
            raw_scores=request.raw_scores,
            top_n=request.top_n,
            truncates=from_proto.truncates(request.truncation),
        )
        return to_proto.rerank_response(call.request_id, found, texts if request.return_texts else None)

    @property
    def _encodings(self) -> Encodings:
        return Encodings(self._gate.backend, self._metrics)
