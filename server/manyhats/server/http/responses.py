"""``response``: OpenAI's Responses API, whose answers are those of chats in another form."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, to_builtins

from manyhats.engine.errors import RequestError
from manyhats.server.http.call import HttpCall
from manyhats.server.http.chat import CallDelta, ChatAnswer, ChatChunk
from manyhats.server.http.openai import OpenAI
from manyhats.server.http.openai_answers import TokenLogprob, UsageBody
from manyhats.server.http.openai_messages import StreamOptions
from manyhats.server.http.responses_answers import (
    Event,
    Incomplete,
    InputDetails,
    OutputCall,
    OutputMessage,
    OutputText,
    Response,
    ResponseFault,
    ResponseUsage,
    Status,
)
from manyhats.server.http.responses_messages import ResponsesBody, as_chat
from manyhats.server.http.status import refusal_of

if TYPE_CHECKING:
    from manyhats.server.observability.metrics import Metrics
    from manyhats.server.service.gate import Gate

# Fields of the service's requests → those of this API.
_FIELDS = {
    "chat.tools": "tools",
    "chat.tool_choice": "tool_choice",
    "chat.template_arguments": "chat_template_kwargs",
    "chat": "input",
    "messages": "input",
    "stopping.max_new_tokens": "max_output_tokens",
    "response_format": "text.format",
    "json_schema": "text.format.schema",
}


class Responses:
    """Answers requests for responses on the backend behind the gate."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._openai = OpenAI(gate, metrics)

    async def respond(self, call: HttpCall, body: ResponsesBody) -> Response | AsyncGenerator[Event, None]:
        """``POST /v1/responses``."""
        with _own_names():
            chat = await self._openai.read(call, partial(as_chat, body))
            if body.stream:
                chat.stream_options = StreamOptions(include_usage=True)
            answer = await self._openai.chat(call, chat)
        making = _Making(call, body)
        if isinstance(answer, ChatAnswer):
            return making.whole(answer)
        return making.events(answer)


@dataclass(slots=True)
class _Making:
    """One response as it is made."""

    call: HttpCall
    body: ResponsesBody
    created_s: int = field(default_factory=lambda: int(time.time()))
    output: list[OutputMessage | OutputCall] = field(default_factory=list)
    finish_reason: str | None = None
    usage: UsageBody | None = None
    num_events: int = 0

    def whole(self, answer: ChatAnswer) -> Response:
        """The response that a chat's answer is."""
        (choice,) = answer.choices
        message, self.finish_reason, self.usage = choice.message, choice.finish_reason, answer.usage
        calls = [] if message.tool_calls is UNSET else message.tool_calls
        if message.content or not calls:
            logprobs = [] if choice.logprobs is None else choice.logprobs.content
            part = OutputText(text=message.content or "", logprobs=logprobs)
            self.output.append(self._new_message("completed" if calls else self.status, part))
        for call in calls:
            status = self.status if call is calls[-1] else "completed"
            self.output.append(self._new_call(call.id, call.function.name, status, call.function.arguments))
        return self.response(answer.model, self.status)

    async def events(self, chunks: AsyncGenerator[ChatChunk, None]) -> AsyncGenerator[Event, None]:
        """The events that a chat's chunks are."""
        model = ""
        async with aclosing(chunks):
            try:
                async for chunk in chunks:
                    if not model:
                        model = chunk.model
                        for event in self._begin(model):
                            yield event
                    for event in self._added(chunk):
                        yield event
            except Exception as error:
                if model:
                    yield self._failed(model, error)
                with _own_names():
                    raise
        for event in self._end(model):
            yield event

    @property
    def status(self) -> Status:
        """How the answer ended."""
        return "incomplete" if self.finish_reason == "length" else "completed"

    def response(self, model: str, status: Status) -> Response:
        """As far as it is made."""
        body = self.body
        return Response(
            id=f"resp_{self.call.request_id}",
            created_at=self.created_s,
            status=status,
            incomplete_details=Incomplete() if status == "incomplete" else None,
            instructions=body.instructions,
            metadata=body.metadata or {},
            model=model,
            output=self.output if status != "in_progress" else [],
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=body.temperature,
            top_p=body.top_p,
            tool_choice="auto" if body.tool_choice is None else to_builtins(body.tool_choice),
            tools=[to_builtins(tool) for tool in body.tools or ()],
            max_output_tokens=body.max_output_tokens,
            text={"format": {"type": "text"}} if body.text is None else to_builtins(body.text),
            usage=None if self.usage is None else _usage(self.usage),
        )

    def _new_message(self, status: Status, *parts: OutputText) -> OutputMessage:
        return OutputMessage(id=f"msg_{self.call.request_id}", status=status, content=list(parts))

    def _new_call(self, call_id: str, name: str, status: Status, arguments: str = "") -> OutputCall:
        item_id = f"fc_{call_id.removeprefix('call_')}"
        return OutputCall(id=item_id, call_id=call_id, name=name, arguments=arguments, status=status)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = Event(type=f"response.{kind}", sequence_number=self.num_events, **fields)
        self.num_events += 1
        return event

    def _of_item(self, kind: str, **fields: Any) -> Event:
        """An event of the last item."""
        return self._event(kind, item_id=self.output[-1].id, output_index=len(self.output) - 1, **fields)

    def _begin(self, model: str) -> Iterator[Event]:
        yield self._event("created", response=self.response(model, "in_progress"))
        yield self._event("in_progress", response=self.response(model, "in_progress"))

    def _added(self, chunk: ChatChunk) -> Iterator[Event]:
        if isinstance(chunk.usage, UsageBody):
            self.usage = chunk.usage
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason
            logprobs = [] if choice.logprobs is None else choice.logprobs.content
            delta = "" if choice.delta.content is UNSET else str(choice.delta.content)
            if delta or logprobs:
                yield from self._added_text(delta, logprobs)
            for call in () if choice.delta.tool_calls is UNSET else choice.delta.tool_calls:
                yield from self._added_call(call)

    def _added_text(self, delta: str, logprobs: list[TokenLogprob]) -> Iterator[Event]:
        if not self.output:
            yield from self._opened_message()
        if isinstance(item := self.output[-1], OutputMessage):
            (part,) = item.content
            part.text += delta
            part.logprobs += logprobs
        yield self._of_item("output_text.delta", content_index=0, delta=delta, logprobs=logprobs)

    def _added_call(self, call: CallDelta) -> Iterator[Event]:
        if call.id is not UNSET:
            yield from self._closed("completed")
            yield from self._opened(self._new_call(call.id, str(call.function.name), "in_progress"))
        elif isinstance(item := self.output[-1], OutputCall):
            item.arguments += call.function.arguments
            yield self._of_item("function_call_arguments.delta", delta=call.function.arguments)

    def _opened(self, item: OutputMessage | OutputCall) -> Iterator[Event]:
        self.output.append(item)
        yield self._event("output_item.added", output_index=len(self.output) - 1, item=copy(item))

    def _opened_message(self) -> Iterator[Event]:
        message = self._new_message("in_progress")
        yield from self._opened(message)
        message.content = [OutputText(text="", logprobs=[])]
        yield self._of_item("content_part.added", content_index=0, part=OutputText(text=""))

    def _closed(self, status: Status) -> Iterator[Event]:
        """The end of the last item, if there is one."""
        if not self.output:
            return
        item = self.output[-1]
        item.status = status
        if isinstance(item, OutputCall):
            yield self._of_item("function_call_arguments.done", name=item.name, arguments=item.arguments)
        else:
            (part,) = item.content
            yield self._of_item("output_text.done", content_index=0, text=part.text, logprobs=part.logprobs)
            yield self._of_item("content_part.done", content_index=0, part=part)
        yield self._event("output_item.done", output_index=len(self.output) - 1, item=item)

    def _end(self, model: str) -> Iterator[Event]:
        if not self.output:
            yield from self._opened_message()
        yield from self._closed(self.status)
        yield self._event(self.status, response=self.response(model, self.status))

    def _failed(self, model: str, error: Exception) -> Event:
        refusal = refusal_of(error)
        code = "rate_limit_exceeded" if refusal.status == 429 else "server_error"
        response = self.response(model, "failed")
        response.output, response.error = [], ResponseFault(code, refusal.body.error.message)
        return self._event("failed", response=response)


@contextmanager
def _own_names() -> Iterator[None]:
    """Name fields as this API does, instead of the chat's."""
    try:
        yield
    except RequestError as error:
        for theirs, ours in _FIELDS.items():
            if error.field == theirs or error.field.startswith((f"{theirs}.", f"{theirs}[")):
                error.renamed(ours)
                break
        raise


def _usage(usage: UsageBody) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )
