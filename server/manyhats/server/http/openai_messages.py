"""The requests of OpenAI's API, and how they become the service's: names and defaults, no rules.

Absent and null are the same. Fields without effect here are read as ``Any`` and ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, json, to_builtins

from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.request import ResponseOptions
from manyhats.engine.text.chat_template import ChatMessage
from manyhats.server.service.conversations import ChatPrompt
from manyhats.server.service.tool_use import ToolUse

MAX_TOP_LOGPROBS = 20

TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream has besides the text's pieces."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Any = None


class TextPart(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """A part of a message's content; only text is understood."""

    text: str


class FunctionCall(Struct, forbid_unknown_fields=True):
    """The function that a model called, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(Struct, forbid_unknown_fields=True):
    """A call that an earlier answer made."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: Any = None


class Message(Struct, forbid_unknown_fields=True, kw_only=True):
    """One turn of a conversation."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Clients send earlier answers back as they came.
    refusal: None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    reasoning: Any = None
    reasoning_content: Any = None


class JsonSchema(Struct, forbid_unknown_fields=True, kw_only=True):
    """A schema that the answer must fit."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool
    strict: bool | None = None


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """Any text."""


class JsonObjectFormat(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """Any JSON object."""


class JsonSchemaFormat(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON that fits a schema."""

    json_schema: JsonSchema


class StructuredOutputs(Struct, forbid_unknown_fields=True, kw_only=True):
    """What the answer must be, by vLLM's names; exactly one."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Speculation(Struct, forbid_unknown_fields=True):
    """How far ahead to guess; this server's own field."""

    num_tokens: int | None = None


class FunctionName(Struct, forbid_unknown_fields=True):
    """A function by its name."""

    name: str


class NamedTool(Struct, forbid_unknown_fields=True):
    """The one tool that must be called."""

    function: FunctionName
    type: Literal["function"] = "function"


class GenerationBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """What requests for chat and for completions share."""

    model: str | None = None
    adapter_id: str | None = None
    lora_path: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: TopLogprobs | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    speculation: Speculation | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # Without effect here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    verbosity: Any = None
    prediction: Any = None
    moderation: Any = None
    reasoning_effort: Any = None

    def __post_init__(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise FieldInvalidError("stream_options", "needs stream: true")

    @property
    def constraint(self) -> Constraint | None:
        """What the answer must be.

        Raises:
            FieldInvalidError: several fields say so, or one cannot be read.
        """
        found = [*_guided(self), *_structured(self.structured_outputs)]
        if isinstance(self.response_format, JsonObjectFormat):
            found.append(_json_schema(_ANY_OBJECT))
        elif isinstance(self.response_format, JsonSchemaFormat):
            found.append(_json_schema(self.response_format.json_schema.schema))
        if len(found) > 1:
            fields = "response_format, structured_outputs, guided_json and their like"
            raise FieldInvalidError(
                "response_format", f"only one of {fields} may say what the answer must be"
            )
        return found[0] if found else None

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of ``SamplingParams`` that are given."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if "seed" in given and -(2**63) <= given["seed"] < 0:
            given["seed"] += 2**64
        return given

    @property
    def guessing(self) -> dict[str, Any]:
        """The fields of ``SpeculationParams`` that are given."""
        num_tokens = None if self.speculation is None else self.speculation.num_tokens
        return {} if num_tokens is None else {"num_tokens": num_tokens}

    @property
    def stopping(self) -> dict[str, Any]:
        """The fields of ``StoppingParams`` that are given."""
        given = {
            ours: value for ours, name in _STOPPING.items() if (value := getattr(self, name)) is not None
        }
        if self.stop is not None:
            given["stop_sequences"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return given


_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "logit_bias",
)
_STOPPING: Mapping[str, str] = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_token_ids": "stop_token_ids",
    "include_stop_sequence": "include_stop_str_in_output",
    "ignore_eos": "ignore_eos",
}


_ANY_OBJECT = {"type": "object"}


def _json_schema(schema: Mapping[str, Any] | bool | str) -> Constraint:
    return Constraint("json_schema", schema if isinstance(schema, str) else json.encode(schema).decode())


def _guided(body: GenerationBody) -> Iterator[Constraint]:
    if body.guided_json is not None:
        yield _json_schema(body.guided_json)
    if body.guided_regex is not None:
        yield Constraint("regex", body.guided_regex)
    if body.guided_choice is not None:
        yield Constraint("choice", body.guided_choice)
    if body.guided_grammar is not None:
        yield Constraint("grammar", body.guided_grammar)


def _structured(given: StructuredOutputs | None) -> Iterator[Constraint]:
    if given is None:
        return
    if given == StructuredOutputs():
        raise FieldInvalidError(
            "structured_outputs", "must have one of json, regex, choice, grammar and json_object"
        )
    if given.json is not None:
        yield _json_schema(given.json)
    if given.json_object:
        yield _json_schema(_ANY_OBJECT)
    if given.regex is not None:
        yield Constraint("regex", given.regex)
    if given.choice is not None:
        yield Constraint("choice", given.choice)
    if given.grammar is not None:
        yield Constraint("grammar", given.grammar)


def conversation(body: Any) -> ChatPrompt:
    """The conversation of a request, and how its chat template writes it.

    Args:
        body: has ``messages``, ``tools``, ``chat_template_kwargs`` and the two fields on how the text ends.

    Raises:
        FieldInvalidError: a field is out of range.
    """
    return ChatPrompt.of(
        body.messages or (),
        _message,
        tools=body.tools or (),
        tool_use=_tool_use(body) if isinstance(body, ChatBody) else None,
        template_arguments=body.chat_template_kwargs or {},
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
    )


def _tool_use(body: ChatBody) -> ToolUse:
    choice = body.tool_choice
    return ToolUse(
        tools=body.tools or (),
        choice="required" if isinstance(choice, NamedTool) else choice or "auto",
        only=choice.function.name if isinstance(choice, NamedTool) else None,
        is_parallel=body.parallel_tool_calls is not False,
    )


def _message(given: Message) -> ChatMessage:
    parts = given.content
    return ChatMessage(
        role=given.role,
        content="".join(part.text for part in parts) if isinstance(parts, list) else parts,
        name=given.name or "",
        tool_calls=[to_builtins(call) for call in given.tool_calls or ()],
        tool_call_id=given.tool_call_id or "",
    )


class ChatBody(GenerationBody, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def stopping(self) -> dict[str, Any]:
        """See ``GenerationBody``; the newer name of ``max_tokens`` wins."""
        given = super().stopping
        if self.max_completion_tokens is not None:
            given["max_new_tokens"] = self.max_completion_tokens
        return given

    @property
    def num_top(self) -> int | None:
        """Most likely tokens to show at each position; None for no log-probabilities."""
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def response(self) -> ResponseOptions:
        """What to return besides the text."""
        if self.top_logprobs and not self.logprobs:
            raise FieldInvalidError("response.top_logprobs", "needs logprobs: true")
        return response_options(self, self.num_top)


class CompletionBody(GenerationBody, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    add_special_tokens: bool | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None
    logprobs: TopLogprobs | None = None

    @property
    def shows_prompt_only(self) -> bool:
        """Whether nothing is to be generated: prompts are echoed, and scored."""
        return bool(self.echo) and self.max_tokens == 0

    @property
    def stopping(self) -> dict[str, Any]:
        """See ``GenerationBody``; where nothing is to be generated, one token is, and left out."""
        given = super().stopping
        return {**given, "max_new_tokens": 1} if self.shows_prompt_only else given

    @property
    def num_top(self) -> int | None:
        """Most likely tokens to show at each position; None for no log-probabilities."""
        return self.logprobs

    @property
    def response(self) -> ResponseOptions:
        """What to return besides the text; ``echo`` shows the prompt's log-probabilities as well."""
        return response_options(self, self.num_top, of_prompt=bool(self.echo))


class TokenizeBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /tokenize``: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


def response_options(
    body: GenerationBody, num_top: int | None, *, of_prompt: bool = False
) -> ResponseOptions:
    """What to return besides the text; ``num_top`` of None is for no log-probabilities."""
    num_of_prompt = body.prompt_logprobs
    if of_prompt and num_top is not None:
        num_of_prompt = max(num_of_prompt or 0, num_top)
    return ResponseOptions(
        logprobs=num_top is not None,
        top_logprobs=max(num_top or 0, num_of_prompt or 0),
        prompt_logprobs=num_of_prompt is not None,
        skip_special_tokens=body.skip_special_tokens is not False,
    )
