"""Generates, scores and tokenizes for callers, whatever the transport."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.request import Request, ResponseOptions, SamplingParams, ScoreRequest, StoppingParams
from manyhats.server.service.prompts import Encoder, Prompt, TextPrompt, TokenPrompt
from manyhats.server.service.text_threads import slices

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.engine.output import ScoreOutput, StepOutput
    from manyhats.engine.text.tokenizer import Tokenizer
    from manyhats.server.observability.metrics import Metrics
    from manyhats.server.service.backend import Backend
    from manyhats.server.service.call import Call

# Limits of Tokenize's answer: tokens, and bytes of their texts.
MAX_TOKENIZED = 256 * 1024
MAX_TOKENIZED_BYTES = 8 * 1024 * 1024


class Generations:
    """Runs callers' requests on the adapter that their call names.

    Args:
        backend: its engine, store and tokenizers.
        metrics: counts.
    """

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics

    async def request(
        self,
        call: Call,
        prompt: Prompt,
        *,
        sampling: SamplingParams,
        stopping: StoppingParams,
        response: ResponseOptions,
        cache_salt: str,
        priority: int,
    ) -> Request:
        """A call's request to the engine: its prompt as tokens, on the version it names.

        Raises:
            AdapterError: there is no such version, or it cannot be used.
            RequestError: the prompt or the salt cannot be served.
        """
        adapter = self._resolved(call)
        tokenizer = await self._tokenizer_of(adapter)
        encoder = self._encoder(tokenizer, self._max_tokens)
        return Request(
            id=call.id,
            prompt_token_ids=await encoder.encode(prompt),
            adapter=adapter,
            tokenizer=tokenizer,
            sampling=sampling,
            stopping=stopping,
            response=response,
            priority=priority,
            deadline_s=call.deadline_s,
            cache_salt=cache_salt,
            accepted_s=call.received_s,
        )

    async def generate(self, asked: Request) -> AsyncGenerator[StepOutput, None]:
        """The engine's outputs, counted; closing this closes the engine's generator at once.

        Raises:
            EngineError, AdapterError: it cannot be served.
        """
        task, since_s, is_first = task_id(asked.adapter), asked.accepted_s, True
        async with aclosing(self._backend.engine.generate(asked)) as outputs:
            async for output in outputs:
                self._metrics.output(task, output, since_s=since_s, is_first=is_first)
                since_s, is_first = output.time_s, False
                yield output

    async def score_request(
        self,
        call: Call,
        prompt: Prompt,
        continuations: Sequence[TextPrompt | TokenPrompt],
        *,
        cache_salt: str,
        priority: int,
    ) -> ScoreRequest:
        """``request`` for a scoring of continuations."""
        adapter = self._resolved(call)
        tokenizer = await self._tokenizer_of(adapter)
        tokens = await self._encoder(tokenizer, self._max_tokens).encode_scoring(prompt, continuations)
        return ScoreRequest(
            id=call.id,
            prompt_token_ids=tokens.prompt_token_ids,
            continuations=tokens.continuations,
            num_given=tokens.num_given,
            adapter=adapter,
            tokenizer=tokenizer,
            response=ResponseOptions(logprobs=True),
            priority=priority,
            deadline_s=call.deadline_s,
            cache_salt=cache_salt,
            accepted_s=call.received_s,
        )

    async def score(self, asked: ScoreRequest) -> ScoreOutput:
        """The scores, counted.

        Raises:
            EngineError, AdapterError: it cannot be served.
        """
        output = await self._backend.engine.score(asked)
        self._metrics.scored(task_id(asked.adapter), output.usage)
        return output

    async def tokenize(self, call: Call, prompt: Prompt) -> tuple[tuple[int, ...], list[str]]:
        """The tokens of a prompt, and the text of each.

        Raises:
            AdapterError: the task does not exist, or its tokenizer cannot be used.
            RequestError: the prompt is invalid, or over a limit.
        """
        tokenizer = await self._tokenizer_of(self._resolved(call))
        ids = await self._encoder(tokenizer, MAX_TOKENIZED).encode(prompt)
        work = partial(_pieces, ids, tokenizer or self._backend.tokenizer, prompt.field)
        return ids, await self._backend.text_threads.run(work, len(ids))

    def _resolved(self, call: Call) -> AdapterRecord | None:
        """The version that a call names; None for the base model."""
        return self._backend.store.resolve(call.name) if call.name else None

    async def _tokenizer_of(self, adapter: AdapterRecord | None) -> Tokenizer | None:
        """The tokenizer of an adapter's task; None for the base's."""
        tokenizers = self._backend.task_tokenizers
        return None if tokenizers is None else await tokenizers.of(adapter)

    def _encoder(self, tokenizer: Tokenizer | None, max_tokens: int) -> Encoder:
        tokenizers = self._backend.task_tokenizers
        render = None
        if tokenizers is not None and tokenizer is not None and tokenizer.has_own_template:
            render = partial(tokenizers.render, tokenizer)
        return Encoder(
            tokenizer or self._backend.tokenizer,
            self._backend.text_threads,
            vocab_size=self._backend.info.vocab_size,
            max_tokens=max_tokens,
            render=render,
        )

    @property
    def _max_tokens(self) -> int:
        """The limit of prompt tokens, which leaves room for at least one more."""
        return self._backend.engine.max_context_length - 1


def _pieces(ids: Sequence[int], tokenizer: Tokenizer, field: str) -> list[str]:
    """The text of each token, in slices: other threads run in between."""
    pieces: list[str] = []
    num_bytes = 0
    for part in slices(ids):
        texts = [tokenizer.piece(token_id) for token_id in part]
        num_bytes += sum(len(text.encode()) for text in texts)
        if num_bytes > MAX_TOKENIZED_BYTES:
            raise FieldInvalidError(
                field,
                f"its tokens have more than {MAX_TOKENIZED_BYTES} bytes of text together, the limit",
            )
        pieces += texts
    return pieces


def task_id(adapter: AdapterRecord | None) -> str:
    """The task of an adapter; "" for the base model."""
    return "" if adapter is None else adapter.task_id
