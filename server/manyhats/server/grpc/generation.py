"""GenerationService: turns messages into requests to the service, and its outputs into messages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

from manyhats.server.grpc import from_proto, to_proto
from manyhats.server.service.call import Call
from manyhats.server.service.gate import Gate
from manyhats.server.service.generations import Generations
from manyhats.server.service.text_threads import num_entries
from manyhats.v1 import generation_pb2

if TYPE_CHECKING:
    from manyhats.engine.output import StepOutput
    from manyhats.engine.request import Request
    from manyhats.server.observability.metrics import Metrics

T = TypeVar("T")


class GenerationService:
    """Generates, scores and tokenizes on the backend behind the gate."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, call: Call
    ) -> generation_pb2.GenerateResponse:
        """Generate one answer, or several, and send them whole."""
        asked = await self._request(request, call)
        answers: defaultdict[int, list[StepOutput]] = defaultdict(list)
        async with aclosing(
            self._generations.generate_several(call, asked, _num_sequences(request))
        ) as outputs:
            async for index, output in outputs:
                answers[index].append(output)
        sequences = [answers[index] for index in range(len(answers))]
        respond = partial(to_proto.generate_response, call.request_id, sequences, asked.adapter)
        all_outputs = (output for sequence in sequences for output in sequence)
        tokens = (token for output in all_outputs for token in (*output.tokens, *output.prompt_tokens))
        return await self._gate.backend.text_threads.build(respond, num_entries(tokens))

    async def GenerateStream(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, call: Call
    ) -> AsyncIterator[generation_pb2.GenerateStreamResponse]:
        """Generate one answer, or several, and send them as they grow."""
        asked = await self._request(request, call)
        begun: set[int] = set()
        async with aclosing(
            self._generations.generate_several(call, asked, _num_sequences(request))
        ) as outputs:
            async for index, output in outputs:
                respond = partial(
                    to_proto.stream_response,
                    call.request_id,
                    output,
                    asked.adapter,
                    index=index,
                    is_first=index not in begun,
                )
                tokens = (*output.tokens, *output.prompt_tokens)
                yield await self._gate.backend.text_threads.build(respond, num_entries(tokens))
                begun.add(index)

    async def Score(  # noqa: N802
        self, request: generation_pb2.ScoreRequest, call: Call
    ) -> generation_pb2.ScoreResponse:
        """Return the log-probability of each continuation."""
        call.identify(request.request_id)
        prompt, continuations = await self._read(
            lambda: (from_proto.prompt(request), from_proto.continuations(request)), request
        )
        asked = await self._generations.score_request(
            call,
            prompt,
            continuations,
            cache_salt=request.cache_salt,
            priority=request.priority,
        )
        output = await self._generations.score(call, asked)
        respond = partial(to_proto.score_response, call.request_id, output, asked.adapter)
        count = sum(num_entries(each.tokens) for each in output.scores)
        return await self._gate.backend.text_threads.build(respond, count)

    async def Tokenize(  # noqa: N802
        self, request: generation_pb2.TokenizeRequest, call: Call
    ) -> generation_pb2.TokenizeResponse:
        """Return the tokens of a prompt."""
        prompt = await self._read(partial(from_proto.prompt, request), request)
        ids, pieces = await self._generations.tokenize(call, prompt)
        return await self._gate.backend.text_threads.build(
            partial(to_proto.tokenize_response, ids, pieces), len(ids)
        )

    async def _request(self, message: generation_pb2.GenerateRequest, call: Call) -> Request:
        call.identify(message.request_id)
        asked = await self._read(partial(_asked, message), message)
        return await self._generations.request(
            call, cache_salt=message.cache_salt, priority=message.priority, **asked
        )

    async def _read(self, read: Callable[[], T], message: Message) -> T:
        """What ``read`` makes of a message; large ones take milliseconds, and are read off the event loop."""
        return await self._gate.backend.text_threads.read(read, message.ByteSize())

    @property
    def _generations(self) -> Generations:
        return Generations(self._gate.backend, self._metrics)


def _asked(message: generation_pb2.GenerateRequest) -> dict[str, Any]:
    """What a message says of a request, by ``Generations.request``'s names."""
    return {
        "sampling": from_proto.sampling(message),
        "stopping": from_proto.stopping(message),
        "speculation": from_proto.speculation(message),
        "response": from_proto.response_options(message),
        "constraint": from_proto.constraint(message),
        "prompt": from_proto.prompt(message),
    }


def _num_sequences(message: generation_pb2.GenerateRequest) -> int:
    return message.num_sequences if message.HasField("num_sequences") else 1
