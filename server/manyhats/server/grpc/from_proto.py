"""From the API's messages to the domain's dataclasses, which check themselves; the API's defaults are here."""

from __future__ import annotations

from manyhats.adapters.registration import OPTIONS, Files, Part, Parts, Registration, Source, UploadFile, Uri
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.request import ResponseOptions, SamplingParams, StoppingParams
from manyhats.server.service.prompts import ChatPrompt, Prompt, TextPrompt, TokenPrompt, check_continuations
from manyhats.v1 import adapter_pb2, generation_pb2

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
            return ChatPrompt.of(message.chat.messages)
    raise FieldInvalidError("prompt", "exactly one of text, token_ids and chat must be set")


def sampling_params(message: generation_pb2.GenerateRequest) -> SamplingParams:
    """How to sample; greedy if the request has no ``sampling``."""
    if not message.HasField("sampling"):
        return SamplingParams()
    sampling = message.sampling
    return SamplingParams(
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        min_p=sampling.min_p,
        typical_p=sampling.typical_p if sampling.HasField("typical_p") else 1.0,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if sampling.HasField("seed") else None,
        logit_bias=sampling.logit_bias,
    )


def stopping_params(message: generation_pb2.GenerateRequest) -> StoppingParams:
    """When to stop."""
    stopping = message.stopping
    return StoppingParams(
        max_new_tokens=stopping.max_new_tokens if stopping.HasField("max_new_tokens") else 256,
        min_new_tokens=stopping.min_new_tokens,
        stop_sequences=stopping.stop_sequences,
        stop_token_ids=stopping.stop_token_ids,
        include_stop_sequence=stopping.include_stop_sequence,
        ignore_eos=stopping.ignore_eos,
        time_limit_s=stopping.time_limit_ms / 1000 if stopping.HasField("time_limit_ms") else None,
    )


def response_options(message: generation_pb2.GenerateRequest) -> ResponseOptions:
    """What to return besides the text."""
    options = message.response
    return ResponseOptions(
        logprobs=options.logprobs,
        top_logprobs=options.top_logprobs,
        prompt_logprobs=options.prompt_logprobs,
        skip_special_tokens=options.skip_special_tokens if options.HasField("skip_special_tokens") else True,
    )


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
        FieldInvalidError: not exactly one of ``uri`` and ``parts`` is set, or a part has no uri.
        ArgumentInvalidError: another value is out of range.
    """
    options = {field.name: value for field, value in message.ListFields() if field.name in OPTIONS}
    return Registration(message.task_id, _source(message), **options)


def _source(message: adapter_pb2.RegisterAdapterRequest | adapter_pb2.UploadHeader) -> Source:
    if isinstance(message, adapter_pb2.UploadHeader):
        return Files([UploadFile(file.name, file.size_bytes, file.sha256) for file in message.files])
    if bool(message.uri) == bool(message.parts):
        raise FieldInvalidError("uri", "exactly one of uri and parts must be set")
    if message.uri:
        return Uri(message.uri)
    return Parts([_part(f"parts[{index}]", part) for index, part in enumerate(message.parts)])


def _part(field: str, message: adapter_pb2.AdapterPart) -> Part:
    if not message.uri:
        raise FieldInvalidError(f"{field}.uri", "must not be empty")
    return Part(message.uri, message.weight if message.HasField("weight") else 1.0)
