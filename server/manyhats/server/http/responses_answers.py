"""The answers of the Responses API, and the events of its streams."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from manyhats.server.http.openai_answers import TokenLogprob

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Struct, kw_only=True):
    """The text of an answer."""

    type: str = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(Struct, kw_only=True, tag_field="type", tag="message"):
    """What the assistant said."""

    id: str
    status: Status
    role: str = "assistant"
    content: list[OutputText]


class OutputCall(Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A call of a tool; its answer names ``call_id``."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status


class InputDetails(Struct, frozen=True, kw_only=True):
    """How much of a prompt was in the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(Struct, frozen=True):
    """Answers here have no reasoning of their own."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct, kw_only=True):
    """What a request cost."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class Incomplete(Struct):
    """Why an answer was cut."""

    reason: str = "max_output_tokens"


class ResponseFault(Struct):
    """Why there is no answer."""

    code: str
    message: str


class Response(Struct, kw_only=True):
    """An answer, and what was asked for."""

    id: str
    object: str = "response"
    created_at: int
    status: Status
    error: ResponseFault | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    temperature: float | None
    top_p: float | None
    tool_choice: Any
    tools: list[Any]
    max_output_tokens: int | None
    text: Any
    truncation: str = "disabled"
    store: bool = False
    background: bool = False
    previous_response_id: None = None
    usage: ResponseUsage | None = None


class Event(Struct, kw_only=True, omit_defaults=True):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int = -1
    response: Response | None = None
    item: OutputMessage | OutputCall | None = None
    part: OutputText | None = None
    item_id: str | None = None
    output_index: int | None = None
    content_index: int | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[TokenLogprob] | None = None

    @property
    def event(self) -> str:
        """Its name among server-sent events."""
        return self.type
