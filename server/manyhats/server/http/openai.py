"""OpenAI's chat and completions: from a request to what the engine runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.output import StepOutput
from manyhats.server.http.call import HttpCall
from manyhats.server.http.chat import ChatAnswer, ChatChunk, chat_answer, chat_chunks
from manyhats.server.http.completions import Completion, completion, completion_chunks, of_prompt_only
from manyhats.server.http.inputs import as_prompts, several
from manyhats.server.http.models import shown_name, task_name
from manyhats.server.http.openai_answers import TokenNames
from manyhats.server.http.openai_messages import ChatBody, CompletionBody, conversation
from manyhats.server.http.run import Output, Run, collected
from manyhats.server.service.gate import Gate
from manyhats.server.service.generations import Generations, check_num_sequences
from manyhats.server.service.merging import merged
from manyhats.server.service.prompts import Prompt
from manyhats.server.service.task_defaults import Fields
from manyhats.server.service.text_threads import num_entries
from manyhats.server.service.tool_calls import call_reader

if TYPE_CHECKING:
    from manyhats.engine.request import Request
    from manyhats.server.observability.metrics import Metrics
    from manyhats.server.service.backend import Backend

T = TypeVar("T")

MAX_PROMPTS = 256
_COMPLETION_TOKENS = 16


class OpenAI:
    """Answers requests for chat and completions on the backend behind the gate."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def chat(self, call: HttpCall, body: ChatBody) -> ChatAnswer | AsyncGenerator[ChatChunk, None]:
        """``POST /v1/chat/completions``."""
        if body.stream and body.prompt_logprobs is not None:
            raise FieldInvalidError("prompt_logprobs", "is not streamed; leave out stream")
        max_tokens = self._gate.backend.engine.max_context_length
        prompt = await self.read(call, partial(conversation, body))
        try:
            run = await self._begin(call, body, "chatcmpl-", [prompt], max_tokens)
        except PromptTooLongError as error:
            error.renamed("messages")
            raise
        new_reader = partial(call_reader, prompt, run.requests[0], run.names.tokenizer)
        if body.stream:
            return chat_chunks(run, self._outputs(call, run), new_reader)
        outputs = await collected(run, self._outputs(call, run))
        return await self._built(partial(chat_answer, run, outputs, new_reader), outputs)

    async def completions(
        self, call: HttpCall, body: CompletionBody
    ) -> Completion | AsyncGenerator[Completion, None]:
        """``POST /v1/completions``."""
        if body.best_of not in (None, 1 if body.n is None else body.n):
            raise FieldInvalidError("best_of", "must equal n: all answers are returned")
        prompts = await self.read(call, partial(prompts_of, body))
        run = await self._begin(call, body, "cmpl-", prompts, _COMPLETION_TOKENS)
        outputs = self._outputs(call, run)
        if body.shows_prompt_only:
            outputs = _of_prompts_only(outputs)
        texts = await self._echoes(run, body)
        if body.stream:
            return completion_chunks(run, outputs, texts, self._built)
        all_outputs = await collected(run, outputs)
        return await self._built(partial(completion, run, all_outputs, texts), all_outputs)

    async def _begin(
        self,
        call: HttpCall,
        body: ChatBody | CompletionBody,
        prefix: str,
        prompts: Sequence[Prompt],
        max_tokens: int,
    ) -> Run:
        """The run of a request; ``max_tokens`` holds where neither it nor its task says."""
        backend = self._gate.backend
        num_choices = 1 if body.n is None else body.n
        check_num_sequences(num_choices)
        call.renamed(body.request_id)
        name = task_name(backend, body.model, body.adapter_id, body.lora_path)
        call.names(name)
        constraint = await self.read(call, lambda: body.constraint)
        request = partial(
            self._generations.request,
            call,
            sampling=Fields(body.sampling, {"temperature": 1.0}),
            stopping=Fields(body.stopping, {"max_new_tokens": max_tokens}),
            speculation=Fields(body.guessing),
            response=body.response,
            constraint=constraint,
            cache_salt=body.cache_salt or "",
            priority=-(body.priority or 0),
        )
        requests = []
        for prompt in prompts:
            requests.append(await request(prompt))
            await asyncio.sleep(0)  # short prompts are tokenized here; others get a turn in between
        adapter = requests[0].adapter
        if adapter is not None:
            call.headers["x-manyhats-version"] = adapter.name
        return Run(
            body=body,
            requests=requests,
            num_choices=num_choices,
            num_top=body.num_top,
            names=TokenNames(
                requests[0].tokenizer or backend.tokenizer, bool(body.return_tokens_as_token_ids)
            ),
            head={
                "id": prefix + call.request_id,
                "created": int(time.time()),
                "model": body.model or shown_name(backend, name),
                "system_fingerprint": _fingerprint(backend, requests[0]),
            },
        )

    async def _outputs(self, call: HttpCall, run: Run) -> AsyncGenerator[Output, None]:
        """What the engine makes of all prompts, as many at once as it runs."""
        generations, num = self._generations, run.num_choices
        streams = [generations.generate_several(call, request, num) for request in run.requests]
        if len(streams) == 1:
            async with aclosing(streams[0]) as only:
                async for output in only:
                    yield output
            return
        at_once = -(-self._gate.backend.limits.max_sequences // num)
        async with aclosing(merged(streams, at_once)) as outputs:
            async for index, (choice, added) in outputs:
                yield index * num + choice, added

    async def _echoes(self, run: Run, body: CompletionBody) -> list[str]:
        """What each prompt shows of itself."""
        if not body.echo:
            return [""] * len(run.requests)
        given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        texts: list[str] = []
        for number, request in enumerate(run.requests):
            text = given[number]
            if not isinstance(text, str):
                ids = request.prompt_token_ids
                work = partial(run.names.tokenizer.text, ids)
                text = await self._gate.backend.text_threads.run(work, len(ids))
                await asyncio.sleep(0)
            texts.append(text)
        return texts

    async def read(self, call: HttpCall, read: Callable[[], T]) -> T:
        """What ``read`` makes of a call's body; large ones take milliseconds, and are read off the event loop."""
        return await self._gate.backend.text_threads.read(read, call.num_bytes)

    @property
    def _generations(self) -> Generations:
        return Generations(self._gate.backend, self._metrics)

    async def _built(self, build: Callable[[], T], outputs: Sequence[Sequence[StepOutput]]) -> T:
        """Build an answer; a large one is built in pieces off the event loop."""
        tokens = (t for each in outputs for output in each for t in (*output.tokens, *output.prompt_tokens))
        return await self._gate.backend.text_threads.build(build, num_entries(tokens))


def prompts_of(body: CompletionBody) -> list[Prompt]:
    """The prompts of a request: texts or token ids, one or several.

    Raises:
        FieldInvalidError: there are none, or too many, or they are neither.
    """
    given = several(body.prompt)
    if not 1 <= len(given) <= MAX_PROMPTS:
        raise FieldInvalidError("prompt", f"must have 1 to {MAX_PROMPTS}, not {len(given)}")
    return as_prompts(given, "prompt", add_special_tokens=body.add_special_tokens is not False)


async def _of_prompts_only(outputs: AsyncGenerator[Output, None]) -> AsyncGenerator[Output, None]:
    async with aclosing(outputs):
        async for number, output in outputs:
            yield number, of_prompt_only(output)


def _fingerprint(backend: Backend, request: Request) -> str:
    """Changes whenever the answer could: the base's and the adapter's digests."""
    digests = [backend.info.digest] + ([] if request.adapter is None else [request.adapter.digest])
    return "-".join(["mh", *(digest.rpartition(":")[2][:8] for digest in digests)])
