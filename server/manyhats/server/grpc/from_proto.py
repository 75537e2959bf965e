"""From the API's messages to the domain's dataclasses, which check themselves; the API's defaults are here."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.struct_pb2 import Struct, Value

from manyhats.adapters.heads import Pooling
from manyhats.adapters.registration import OPTIONS, Files, Part, Registration, Source, UploadFile, source_of
from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.request import ResponseOptions
from manyhats.engine.text.chat_template import ChatMessage
from manyhats.server.service.conversations import ChatPrompt, json_object
from manyhats.server.service.entities import Aggregation
from manyhats.server.service.prompts import (
    Prompt,
    TextPrompt,
    TokenPrompt,
    check_continuations,
    check_num_inputs,
)
from manyhats.server.service.task_defaults import Fields
from manyhats.v1 import adapter_pb2, encoding_pb2, generation_pb2

E = TypeVar("E", bound=Enum)
PromptMessage = generation_pb2.GenerateRequest | generation_pb2.ScoreRequest | generation_pb2.TokenizeRequest


def prompt(message: PromptMessage) -> Prompt:
    """The prompt of a request; the fields of a oneof exclude one another on the wire.

    Raises:
        FieldInvalidError: it is missing, empty or over a limit.
    """
    match message.WhichOneof("prompt"):
        case "text":
            special = message.add_special_tokens if message.HasField("add_special_tokens") else True
            return TextPrompt(message.text, add_special_tokens=special)
        case "token_ids":
            return TokenPrompt(message.token_ids.ids)
        case "chat":
            return _chat(message.chat)
    raise FieldInvalidError("prompt", "exactly one of text, token_ids and chat must be set")


def text_inputs(
    messages: Sequence[encoding_pb2.TextInput], *, add_special_tokens: bool = True
) -> tuple[Prompt, ...]:
    """The texts to read; errors name them as in ``inputs[3]``.

    Raises:
        FieldInvalidError: there are none or too many, or one is missing, empty or over a limit.
    """
    check_num_inputs(len(messages))
    return tuple(
        _text_input(f"inputs[{index}]", each, add_special_tokens) for index, each in enumerate(messages)
    )


def plain_texts(messages: Sequence[encoding_pb2.TextInput]) -> tuple[TextPrompt, ...]:
    """``text_inputs`` whose characters are known: texts alone.

    Raises:
        FieldInvalidError: as ``text_inputs``; or one is something else.
    """
    texts = text_inputs(messages)
    for index, each in enumerate(texts):
        if not isinstance(each, TextPrompt) or each.first is not None:
            raise FieldInvalidError(f"inputs[{index}]", "must be a text, without a pair")
    return cast(tuple[TextPrompt, ...], texts)


def reranked(message: encoding_pb2.RerankRequest) -> Sequence[str]:
    """The texts to sort.

    Raises:
        FieldInvalidError: there are none or too many.
    """
    check_num_inputs(len(message.texts), "texts")
    return message.texts


def _text_input(field: str, message: encoding_pb2.TextInput, special: bool) -> Prompt:
    kind = message.WhichOneof("content")
    if message.text_pair and kind != "text":
        raise FieldInvalidError(f"{field}.text_pair", "needs text")
    match kind:
        case "text" if message.text_pair:
            first = TextPrompt(message.text, field=f"{field}.text")
            return TextPrompt(message.text_pair, special, f"{field}.text_pair", first.text)
        case "text":
            return TextPrompt(message.text, special, f"{field}.text")
        case "token_ids":
            return TokenPrompt(message.token_ids.ids, f"{field}.token_ids")
        case "chat":
            try:
                return _chat(message.chat, begins=False)
            except FieldInvalidError as error:
                error.renamed(f"{field}.{error.field}")
                raise
    raise FieldInvalidError(field, "exactly one of text, token_ids and chat must be set")


def pooling(value: adapter_pb2.Pooling.ValueType) -> Pooling | None:
    """What to read of hidden values; None where that is not said.

    Raises:
        FieldInvalidError: it is a value that this server does not know.
    """
    return _member(Pooling, "pooling", adapter_pb2.Pooling.DESCRIPTOR, value)


def aggregation(value: encoding_pb2.Aggregation.ValueType) -> Aggregation | None:
    """How classes of tokens become entities; None if they do not. Raises as ``pooling``."""
    return _member(Aggregation, "aggregation", encoding_pb2.Aggregation.DESCRIPTOR, value)


def truncates(value: encoding_pb2.Truncation.ValueType) -> bool:
    """Whether texts that are too long are cut at their ends.

    Raises:
        FieldInvalidError: it is a value that this server does not know.
    """
    if value not in encoding_pb2.Truncation.values():
        raise FieldInvalidError("truncation", f"{value} is not known")
    return value == encoding_pb2.TRUNCATION_END


def _member(kind: type[E], field: str, enum: EnumDescriptor, value: int) -> E | None:
    """The member of ``kind`` that has the name of an enum's value; its zero stands for None."""
    if not value:
        return None
    known = enum.values_by_number.get(value)
    if known is None:
        raise FieldInvalidError(field, f"{value} is not known")
    return kind[known.name.removeprefix(f"{field.upper()}_")]


def _chat(message: generation_pb2.ChatMessages, *, begins: bool | None = None) -> ChatPrompt:
    if message.HasField("add_generation_prompt"):
        begins = message.add_generation_prompt
    return ChatPrompt.of(
        message.messages,
        _turn,
        tools=[json_object(f"chat.tools[{index}]", tool) for index, tool in enumerate(message.tools)],
        template_arguments=_json(message.template_arguments),
        add_generation_prompt=begins,
        continue_final_message=message.continue_final_message,
    )


def _json(value: Struct | Value) -> Any:
    """What a struct stands for; a number without a fraction is an int, as in JSON."""
    if isinstance(value, Struct):
        return {name: _json(each) for name, each in value.fields.items()}
    match value.WhichOneof("kind"):
        case "struct_value":
            return _json(value.struct_value)
        case "list_value":
            return [_json(each) for each in value.list_value.values]
        case "number_value" if value.number_value.is_integer():
            return int(value.number_value)
        case "null_value" | None:
            return None
        case kind:
            return getattr(value, kind)


def _turn(message: generation_pb2.ChatMessage) -> ChatMessage:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    return ChatMessage(
        role=message.role,
        content=message.content or (None if calls else ""),
        name=message.name,
        tool_calls=tuple(calls),
        tool_call_id=message.tool_call_id,
    )


def sampling(message: generation_pb2.GenerateRequest) -> Fields:
    """How to sample; where nothing is decided, greedy if the request has no ``sampling``."""
    otherwise = {"temperature": 1.0 if message.HasField("sampling") else 0.0}
    return Fields(_set(message.sampling), otherwise)


def stopping(message: generation_pb2.GenerateRequest) -> Fields:
    """When to stop."""
    given = _set(message.stopping)
    if "time_limit_ms" in given:
        given["time_limit_s"] = given.pop("time_limit_ms") / 1000
    return Fields(given, {"max_new_tokens": 256})


def speculation(message: generation_pb2.GenerateRequest) -> Fields:
    """How far ahead to guess."""
    return Fields(_set(message.speculation))


def _set(
    message: generation_pb2.SamplingParams | generation_pb2.StoppingParams | generation_pb2.Speculation,
) -> dict[str, Any]:
    """The fields that are set, by name; the dataclasses' have the same."""
    return {field.name: value for field, value in message.ListFields()}


def response_options(message: generation_pb2.GenerateRequest) -> ResponseOptions:
    """What to return besides the text."""
    options = message.response
    return ResponseOptions(
        logprobs=options.logprobs,
        top_logprobs=options.top_logprobs,
        prompt_logprobs=options.prompt_logprobs,
        skip_special_tokens=options.skip_special_tokens if options.HasField("skip_special_tokens") else True,
    )


def constraint(message: generation_pb2.GenerateRequest) -> Constraint | None:
    """What language the answer must be in; the fields of a oneof exclude one another on the wire.

    Raises:
        FieldInvalidError: it is over a bound, or cannot be read.
    """
    match message.WhichOneof("constraint"):
        case None:
            return None
        case "choice":
            return Constraint("choice", message.choice.options)
        case kind:
            return Constraint(kind, getattr(message, kind))


def continuations(message: generation_pb2.ScoreRequest) -> tuple[TextPrompt | TokenPrompt, ...]:
    """The continuations to score; a text is tokenized without special tokens.

    Raises:
        FieldInvalidError: there are none or too many, or one is missing or empty.
    """
    given = message.continuations
    check_continuations([each.text for each in given])
    return tuple(_continuation(f"continuations[{index}]", each) for index, each in enumerate(given))


def _continuation(field: str, message: generation_pb2.Continuation) -> TextPrompt | TokenPrompt:
    match message.WhichOneof("content"):
        case "text":
            return TextPrompt(message.text, add_special_tokens=False, field=f"{field}.text")
        case "token_ids":
            return TokenPrompt(message.token_ids.ids, field=f"{field}.token_ids")
    raise FieldInvalidError(field, "exactly one of text and token_ids must be set")


def registration(
    message: adapter_pb2.RegisterAdapterRequest | adapter_pb2.UploadHeader,
) -> Registration:
    """What to register, and how; the message's options have the same names as the registration's.

    Raises:
        ArgumentInvalidError: a value is out of range.
    """
    options = {field.name: value for field, value in message.ListFields() if field.name in OPTIONS}
    return Registration(message.task_id, _source(message), **options)


def _source(message: adapter_pb2.RegisterAdapterRequest | adapter_pb2.UploadHeader) -> Source:
    if isinstance(message, adapter_pb2.UploadHeader):
        return Files([UploadFile(file.name, file.size_bytes, file.sha256) for file in message.files])
    return source_of(message.uri, [_part(part) for part in message.parts])


def _part(message: adapter_pb2.AdapterPart) -> Part:
    return Part(message.uri, message.weight if message.HasField("weight") else 1.0)
