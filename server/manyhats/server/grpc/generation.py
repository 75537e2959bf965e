"""GenerationService: turns messages into requests to the service, and its outputs into messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from manyhats.server.grpc import from_proto, to_proto
from manyhats.server.service.call import Call
from manyhats.server.service.gate import Gate
from manyhats.server.service.generations import Generations
from manyhats.v1 import generation_pb2

if TYPE_CHECKING:
    from manyhats.engine.request import Request
    from manyhats.server.observability.metrics import Metrics

T = TypeVar("T")

# The cost of adding a token to a message, in characters to tokenize.
_TEXT_LENGTH = 17


class GenerationService:
    """Generates, scores and tokenizes on the backend behind the gate."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, call: Call
    ) -> generation_pb2.GenerateResponse:
        """Generate one answer and send it whole."""
        asked = await self._request(request, call)
        async with aclosing(self._generations.generate(asked)) as outputs:
            answer = [output async for output in outputs]
        respond = partial(to_proto.generate_response, call.request_id, answer, asked.adapter)
        tokens = (token for output in answer for token in (*output.tokens, *output.prompt_tokens))
        return await self._built(respond, to_proto.num_entries(tokens))

    async def GenerateStream(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, call: Call
    ) -> AsyncIterator[generation_pb2.GenerateStreamResponse]:
        """Generate one answer and send it as it grows."""
        asked = await self._request(request, call)
        is_first = True
        async with aclosing(self._generations.generate(asked)) as outputs:
            async for output in outputs:
                respond = partial(
                    to_proto.stream_response, call.request_id, output, asked.adapter, is_first=is_first
                )
                tokens = (*output.tokens, *output.prompt_tokens)
                yield await self._built(respond, to_proto.num_entries(tokens))
                is_first = False

    async def Score(  # noqa: N802
        self, request: generation_pb2.ScoreRequest, call: Call
    ) -> generation_pb2.ScoreResponse:
        """Return the log-probability of each continuation."""
        call.identify(request.request_id)
        asked = await self._generations.score_request(
            call,
            from_proto.prompt(request),
            from_proto.continuations(request),
            cache_salt=request.cache_salt,
            priority=request.priority,
        )
        output = await self._generations.score(asked)
        respond = partial(to_proto.score_response, call.request_id, output, asked.adapter)
        return await self._built(respond, sum(to_proto.num_entries(each.tokens) for each in output.scores))

    async def Tokenize(  # noqa: N802
        self, request: generation_pb2.TokenizeRequest, call: Call
    ) -> generation_pb2.TokenizeResponse:
        """Return the tokens of a prompt."""
        ids, pieces = await self._generations.tokenize(call, from_proto.prompt(request))
        return await self._built(partial(to_proto.tokenize_response, ids, pieces), len(ids))

    async def _request(self, message: generation_pb2.GenerateRequest, call: Call) -> Request:
        call.identify(message.request_id)
        return await self._generations.request(
            call,
            sampling=from_proto.sampling_params(message),
            stopping=from_proto.stopping_params(message),
            response=from_proto.response_options(message),
            cache_salt=message.cache_salt,
            priority=message.priority,
            prompt=from_proto.prompt(message),
        )

    @property
    def _generations(self) -> Generations:
        return Generations(self._gate.backend, self._metrics)

    def _built(self, respond: Callable[[], T], num_entries: int) -> Awaitable[T]:
        """Build a message of this many tokens; a large one is built in pieces off the event loop."""
        return self._gate.backend.text_threads.run(respond, _TEXT_LENGTH * num_entries)
