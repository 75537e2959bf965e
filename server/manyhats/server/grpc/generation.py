"""GenerationService: turns messages into requests of the engine, and its outputs into messages."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import grpc
import structlog

from manyhats.adapters.artifact import AdapterRecord
from manyhats.engine.output import StepOutput
from manyhats.engine.request import Request, ResponseOptions, ScoreRequest
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.server.grpc import from_proto, to_proto
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.gate import Gate
from manyhats.server.service.ports import Backend
from manyhats.server.service.prompts import encode_prompts, encode_scoring
from manyhats.v1 import generation_pb2, generation_pb2_grpc

T = TypeVar("T")
Context = grpc.aio.ServicerContext[object, object]

# What adding a token to a message takes, in characters to tokenize.
_TEXT_LENGTH = 17

# In the answer of Tokenize: tokens, and bytes of their texts.
MAX_TOKENIZED = 256 * 1024
MAX_TOKENIZED_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Accepted:
    """What is settled of every request before its fields are looked at.

    Attributes:
        request_id: the caller's, or made here; what replies and logs say.
        engine_id: unique in this process, so that callers may repeat their ids.
        accepted_s, deadline_s: on ``time.monotonic()``'s clock.
    """

    request_id: str
    engine_id: str
    accepted_s: float
    deadline_s: float | None


def accept(message: from_proto.GenerationMessage, context: Context) -> Accepted:
    """Name a request and take its deadline."""
    now_s = time.monotonic()
    remaining_s: float | None = context.time_remaining()  # None without a deadline
    engine_id = uuid.uuid4().hex
    request_id = from_proto.request_id(message) or engine_id
    structlog.contextvars.bind_contextvars(request_id=request_id)
    return Accepted(request_id, engine_id, now_s, None if remaining_s is None else now_s + remaining_s)


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Generates, scores and tokenizes on the backend behind the gate."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        """Generate one answer and send it whole."""
        accepted = accept(request, context)
        asked = await self._request(request, accepted)
        async with aclosing(self._outputs(asked)) as outputs:
            answer = [output async for output in outputs]
        respond = partial(to_proto.generate_response, accepted.request_id, answer, asked.adapter)
        tokens = (token for output in answer for token in (*output.tokens, *output.prompt_tokens))
        return await self._built(respond, to_proto.num_entries(tokens))

    async def GenerateStream(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateStreamResponse]:
        """Generate one answer and send it as it grows."""
        accepted = accept(request, context)
        asked = await self._request(request, accepted)
        is_first = True
        async with aclosing(self._outputs(asked)) as outputs:
            async for output in outputs:
                respond = partial(
                    to_proto.stream_response, accepted.request_id, output, asked.adapter, is_first=is_first
                )
                tokens = (*output.tokens, *output.prompt_tokens)
                yield await self._built(respond, to_proto.num_entries(tokens))
                is_first = False

    async def Score(  # noqa: N802
        self, request: generation_pb2.ScoreRequest, context: Context
    ) -> generation_pb2.ScoreResponse:
        """Give the log-probability of each continuation."""
        accepted = accept(request, context)
        asked = await self._score_request(request, accepted)
        output = await self._gate.backend.engine.score(asked)
        self._metrics.scored(task_id(asked.adapter), output.usage)
        respond = partial(to_proto.score_response, accepted.request_id, output, asked.adapter)
        return await self._built(respond, sum(to_proto.num_entries(each.tokens) for each in output.scores))

    def _built(self, respond: Callable[[], T], num_entries: int) -> Awaitable[T]:
        """A message of this many tokens; a large one is built in pieces beside the event loop."""
        return self._gate.backend.text_threads.run(respond, _TEXT_LENGTH * num_entries)

    async def Tokenize(  # noqa: N802
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        """Give the tokens of a prompt."""
        backend = self._gate.backend
        tokenizer = await tokenizer_of(backend, resolve(backend, request.task_id))
        prompt = from_proto.prompt(request)
        (ids,) = await encode_prompts(backend, [prompt], tokenizer=tokenizer, max_tokens=MAX_TOKENIZED)
        piece = (tokenizer or backend.tokenizer).piece
        respond = partial(
            to_proto.tokenize_response, ids, piece, field=prompt.field, max_bytes=MAX_TOKENIZED_BYTES
        )
        return await backend.text_threads.run(respond, len(ids))

    async def _outputs(self, asked: Request) -> AsyncGenerator[StepOutput, None]:
        """The engine's outputs, counted; closing this closes the engine's generator at once."""
        task, since_s, is_first = task_id(asked.adapter), asked.accepted_s, True
        async with aclosing(self._gate.backend.engine.generate(asked)) as outputs:
            async for output in outputs:
                self._metrics.output(task, output, since_s=since_s, is_first=is_first)
                since_s, is_first = output.time_s, False
                yield output

    async def _request(self, message: generation_pb2.GenerateRequest, accepted: Accepted) -> Request:
        backend = self._gate.backend
        asked = Request(
            id=accepted.engine_id,
            sampling=from_proto.sampling_params(message),
            stopping=from_proto.stopping_params(message),
            response=from_proto.response_options(message),
            cache_salt=from_proto.cache_salt(message),
            priority=message.priority,
            adapter=resolve(backend, message.task_id),
            prompt_token_ids=(),
            deadline_s=accepted.deadline_s,
            accepted_s=accepted.accepted_s,
        )
        prompt = from_proto.prompt(message)
        tokenizer = await tokenizer_of(backend, asked.adapter)
        (token_ids,) = await encode_prompts(
            backend, [prompt], tokenizer=tokenizer, max_tokens=_max_tokens(backend)
        )
        return replace(asked, prompt_token_ids=token_ids, tokenizer=tokenizer)

    async def _score_request(self, message: generation_pb2.ScoreRequest, accepted: Accepted) -> ScoreRequest:
        backend = self._gate.backend
        prompt, continuations = from_proto.prompt(message), from_proto.continuations(message)
        adapter = resolve(backend, message.task_id)
        tokenizer = await tokenizer_of(backend, adapter)
        tokens = await encode_scoring(
            backend, prompt, continuations, tokenizer=tokenizer, max_tokens=_max_tokens(backend)
        )
        return ScoreRequest(
            id=accepted.engine_id,
            cache_salt=from_proto.cache_salt(message),
            priority=message.priority,
            response=ResponseOptions(logprobs=True),
            adapter=adapter,
            tokenizer=tokenizer,
            prompt_token_ids=tokens.prompt_token_ids,
            continuations=tokens.continuations,
            num_given=tokens.num_given,
            deadline_s=accepted.deadline_s,
            accepted_s=accepted.accepted_s,
        )


def _max_tokens(backend: Backend) -> int:
    """Of what the engine is to run on; one token at least comes after, or before."""
    return backend.engine.max_context_length - 1


async def tokenizer_of(backend: Backend, adapter: AdapterRecord | None) -> Tokenizer | None:
    """What reads and writes the text of an adapter's task; None is the base's."""
    return None if backend.task_tokenizers is None else await backend.task_tokenizers.of(adapter)


def resolve(backend: Backend, name: str) -> AdapterRecord | None:
    """The adapter version that ``task`` or ``task@3`` means; None for "", the base model."""
    return backend.store.resolve(name) if name else None


def task_id(adapter: AdapterRecord | None) -> str:
    """The task of an adapter; "" for the base model."""
    return "" if adapter is None else adapter.task_id
