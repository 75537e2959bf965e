"""The requests of OpenAI's Responses API, and how they become chats; stateless: nothing is stored.

Absent and null are the same. Fields without effect here are read as ``Any`` and ignored.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from manyhats.engine.errors import FieldInvalidError
from manyhats.server.http.openai_messages import (
    ChatBody,
    FunctionCall,
    FunctionName,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    Message,
    NamedTool,
    Speculation,
    StreamOptions,
    TextFormat,
    ToolCall,
    TopLogprobs,
)

LOGPROBS = "message.output_text.logprobs"


class InputPart(Struct, forbid_unknown_fields=True, kw_only=True):
    """A part of an item's content; only text is understood."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Any = None
    logprobs: Any = None


class InputItem(Struct, forbid_unknown_fields=True, kw_only=True):
    """A message, a call of a function, or what the function returned."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: str | None = None
    content: str | list[InputPart] | None = None
    name: str | None = None
    arguments: str | None = None
    call_id: str | None = None
    output: str | list[InputPart] | None = None
    # Clients send earlier answers back as they came.
    id: Any = None
    status: Any = None
    phase: Any = None


class JsonSchemaText(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True, kw_only=True):
    """JSON that fits a schema."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool
    strict: bool | None = None


class TextConfig(Struct, forbid_unknown_fields=True):
    """What the text must be."""

    format: TextFormat | JsonObjectFormat | JsonSchemaText | None = None
    verbosity: Any = None


class FunctionTool(Struct, forbid_unknown_fields=True, kw_only=True):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Struct, forbid_unknown_fields=True, kw_only=True):
    """The one function to call."""

    type: Literal["function"]
    name: str


class ResponsesBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/responses``."""

    model: str | None = None
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    speculation: Speculation | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    # Nothing is stored, so that these can mean nothing but "no".
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None
    prompt: None = None
    # Without effect here.
    store: Any = None
    reasoning: Any = None
    user: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    max_tool_calls: Any = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())


def as_chat(body: ResponsesBody) -> ChatBody:
    """The chat that a request for a response is.

    Raises:
        FieldInvalidError: an item is not what its type says, or log-probabilities are wanted of calls.
    """
    if body.wants_logprobs and body.tools and body.tool_choice != "none":
        raise FieldInvalidError(
            "include", "log-probabilities are not given with tools; leave one of them out"
        )
    return ChatBody(
        messages=_messages(body),
        model=body.model,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=body.seed,
        stop=body.stop,
        response_format=_format(body.text),
        tools=_tools(body.tools),
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        logprobs=body.wants_logprobs,
        top_logprobs=body.top_logprobs,
        stream=body.stream,
        chat_template_kwargs=body.chat_template_kwargs,
        speculation=body.speculation,
        priority=body.priority,
        cache_salt=body.cache_salt,
        request_id=body.request_id,
    )


def _messages(body: ResponsesBody) -> list[Message]:
    messages = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        return [*messages, Message(role="user", content=body.input)]
    calls: list[ToolCall] = []  # those that follow each other are one turn, with the text ahead of them
    for index, item in enumerate(body.input):
        if item.type == "function_call":
            calls.append(_call(index, item))
            if len(calls) == 1:
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message(role="assistant"))
                messages[-1].tool_calls = calls
            continue
        calls = []
        messages.append(_output(index, item) if item.type == "function_call_output" else _turn(index, item))
    return messages


def _turn(index: int, item: InputItem) -> Message:
    if item.role is None:
        raise FieldInvalidError(f"input[{index}].role", "is required")
    if item.content is None:
        raise FieldInvalidError(f"input[{index}].content", "is required")
    return Message(role=item.role, content=_text(item.content))


def _call(index: int, item: InputItem) -> ToolCall:
    for name in ("call_id", "name", "arguments"):
        if getattr(item, name) is None:
            raise FieldInvalidError(f"input[{index}].{name}", "is required")
    function = FunctionCall(item.name or "", item.arguments or "")
    return ToolCall(id=item.call_id or "", function=function)


def _output(index: int, item: InputItem) -> Message:
    for name in ("call_id", "output"):
        if getattr(item, name) is None:
            raise FieldInvalidError(f"input[{index}].{name}", "is required")
    return Message(role="tool", content=_text(item.output or ""), tool_call_id=item.call_id)


def _text(content: str | list[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _format(text: TextConfig | None) -> TextFormat | JsonObjectFormat | JsonSchemaFormat | None:
    given = None if text is None else text.format
    if isinstance(given, JsonSchemaText):
        return JsonSchemaFormat(JsonSchema(name=given.name, schema=given.schema, strict=given.strict))
    return given


def _tools(tools: list[FunctionTool] | None) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    return [
        {
            "type": "function",
            "function": {
                name: value
                for name, value in (
                    ("name", tool.name),
                    ("description", tool.description),
                    ("parameters", tool.parameters),
                )
                if value is not None
            },
        }
        for tool in tools
    ]


def _choice(choice: Literal["none", "auto", "required"] | NamedFunction | None) -> Any:
    return NamedTool(FunctionName(choice.name)) if isinstance(choice, NamedFunction) else choice
