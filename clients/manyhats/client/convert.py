"""Plain values to request messages, and response messages to results. Pure; both clients use it.

``adapter_convert`` has the calls that manage adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

from manyhats.client.fields import assign, enum_name, invalid
from manyhats.client.requests import ChatMessage, Continuation, Prompt
from manyhats.client.results import (
    AdapterRef,
    FinishReason,
    Generation,
    GenerationChunk,
    Score,
    ScoreResult,
    ServerInfo,
    ServerLimits,
    Token,
    Tokenization,
    TopToken,
    Usage,
)
from manyhats.v1 import generation_pb2, server_pb2

PromptRequest: TypeAlias = (
    generation_pb2.GenerateRequest | generation_pb2.ScoreRequest | generation_pb2.TokenizeRequest
)

_PROMPT_OPTIONS = ("request_id", "add_special_tokens", "cache_salt", "priority")

# Where each option of `generate` goes in GenerateRequest; "" is the request itself.
_SECTIONS: Mapping[str, str] = MappingProxyType(
    {field.name: "sampling" for field in generation_pb2.SamplingParams.DESCRIPTOR.fields}
    | {field.name: "stopping" for field in generation_pb2.StoppingParams.DESCRIPTOR.fields}
    | {field.name: "response" for field in generation_pb2.ResponseOptions.DESCRIPTOR.fields}
    | dict.fromkeys(_PROMPT_OPTIONS, "")
)


# Requests.


def generate_request(
    prompt: Prompt, task_id: str, options: Mapping[str, object]
) -> generation_pb2.GenerateRequest:
    """The request of ``generate`` and ``generate_stream``.

    Raises:
        InvalidRequestError: a value does not fit its field.
        TypeError: there is no option of that name.
    """
    request = generation_pb2.GenerateRequest(task_id=task_id)
    _set_prompt(request, prompt)
    for name, value in options.items():
        if name not in _SECTIONS:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
        if value is not None:
            section = _SECTIONS[name]
            message = getattr(request, section) if section else request
            assign(message, name, value, f"{section}.{name}" if section else name)
    return request


def score_request(
    prompt: Prompt, continuations: Iterable[Continuation], task_id: str, options: Mapping[str, object]
) -> generation_pb2.ScoreRequest:
    """The request of ``score``; raises as ``generate_request`` does."""
    if isinstance(continuations, str):
        raise TypeError("continuations must be several texts or lists of token ids, not one text")
    request = generation_pb2.ScoreRequest(task_id=task_id)
    _set_prompt(request, prompt)
    for index, continuation in enumerate(continuations):
        _set_content(request.continuations.add(), continuation, f"continuations[{index}]")
    for name, value in options.items():
        if name not in _PROMPT_OPTIONS:
            raise TypeError(f"score() got an unexpected keyword argument {name!r}")
        if value is not None:
            assign(request, name, value, name)
    return request


def tokenize_request(
    prompt: Prompt, task_id: str, add_special_tokens: bool | None
) -> generation_pb2.TokenizeRequest:
    """The request of ``tokenize``."""
    request = generation_pb2.TokenizeRequest(task_id=task_id, add_special_tokens=add_special_tokens)
    _set_prompt(request, prompt)
    return request


def _set_prompt(request: PromptRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    if not isinstance(prompt, Iterable):
        raise invalid("prompt", f"must be text, token ids or chat messages, not {type(prompt).__name__}")
    items = list(prompt)
    if items and isinstance(items[0], ChatMessage | Mapping):
        request.chat.SetInParent()
        for index, message in enumerate(items):
            _add_message(request.chat, message, f"chat.messages[{index}]")
    else:
        request.token_ids.SetInParent()
        assign(request.token_ids, "ids", items, "token_ids")


def _add_message(chat: generation_pb2.ChatMessages, message: object, path: str) -> None:
    if isinstance(message, ChatMessage):
        chat.messages.add(role=message.role, content=message.content)
        return
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise invalid(path, "must have exactly a role and a content")
    added = chat.messages.add()
    for key in ("role", "content"):
        assign(added, key, message[key], f"{path}.{key}")


def _set_content(message: generation_pb2.Continuation, content: Continuation, path: str) -> None:
    if isinstance(content, str):
        message.text = content
    else:
        message.token_ids.SetInParent()
        assign(message.token_ids, "ids", content, f"{path}.token_ids")


# Responses.


def generation(response: generation_pb2.GenerateResponse) -> Generation:
    """A whole answer."""
    return Generation(
        text=response.text,
        tokens=_tokens(response.tokens),
        finish_reason=_finish_reason(response.finish_reason),
        usage=_usage(response.usage),
        adapter=_adapter_ref(response),
        prompt_tokens=_tokens(response.prompt_tokens),
        request_id=response.request_id,
    )


def generation_chunk(response: generation_pb2.GenerateStreamResponse) -> GenerationChunk:
    """A piece of a streamed answer."""
    ended = response.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED
    return GenerationChunk(
        text=response.text,
        tokens=_tokens(response.tokens),
        finish_reason=_finish_reason(response.finish_reason) if ended else None,
        usage=_usage(response.usage) if response.HasField("usage") else None,
        adapter=_adapter_ref(response),
        prompt_tokens=_tokens(response.prompt_tokens),
        request_id=response.request_id,
    )


def score_result(response: generation_pb2.ScoreResponse) -> ScoreResult:
    """Scores, in the order requested."""
    return ScoreResult(
        scores=tuple(
            Score(logprob=score.logprob, num_tokens=score.num_tokens, tokens=_tokens(score.tokens))
            for score in response.scores
        ),
        usage=_usage(response.usage),
        adapter=_adapter_ref(response),
        request_id=response.request_id,
    )


def tokenization(response: generation_pb2.TokenizeResponse) -> Tokenization:
    """A prompt's tokens."""
    return Tokenization(ids=tuple(response.ids), pieces=tuple(response.pieces))


def server_info(response: server_pb2.GetServerInfoResponse) -> ServerInfo:
    """What the server is."""
    return ServerInfo(
        version=response.version,
        base_model=response.base_model,
        base_digest=response.base_digest,
        quantization=response.quantization,
        dtype=response.dtype,
        device=response.device,
        max_context_length=response.max_context_length,
        vocab_size=response.vocab_size,
        limits=_limits(response.limits) if response.HasField("limits") else None,
    )


def _limits(limits: server_pb2.ServerLimits) -> ServerLimits:
    values: dict[str, Any] = {
        field.name: None if field.has_presence else 0 for field in limits.DESCRIPTOR.fields
    }
    values |= {field.name: value for field, value in limits.ListFields()}
    return ServerLimits(**values)


def join_chunks(chunks: Sequence[GenerationChunk]) -> Generation:
    """The whole answer from a stream's chunks; for an interrupted stream, as much as there is."""
    last = chunks[-1] if chunks else GenerationChunk(text="")
    return Generation(
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        finish_reason=last.finish_reason or FinishReason.UNSPECIFIED,
        usage=last.usage or Usage(),
        adapter=next((chunk.adapter for chunk in chunks if chunk.adapter is not None), None),
        prompt_tokens=tuple(token for chunk in chunks for token in chunk.prompt_tokens),
        request_id=next((chunk.request_id for chunk in chunks if chunk.request_id), ""),
    )


def _tokens(tokens: Iterable[generation_pb2.TokenInfo]) -> tuple[Token, ...]:
    return tuple(
        Token(
            id=token.id,
            text=token.text,
            logprob=token.logprob if token.HasField("logprob") else None,
            rank=token.rank if token.HasField("rank") else None,
            top=tuple(TopToken(id=top.id, text=top.text, logprob=top.logprob) for top in token.top),
        )
        for token in tokens
    )


def _usage(usage: generation_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        generated_tokens=usage.generated_tokens,
        queue_ms=usage.queue_ms,
        prefill_ms=usage.prefill_ms,
        decode_ms=usage.decode_ms,
        adapter_load_ms=usage.adapter_load_ms,
    )


def _adapter_ref(
    response: generation_pb2.GenerateResponse
    | generation_pb2.GenerateStreamResponse
    | generation_pb2.ScoreResponse,
) -> AdapterRef | None:
    """None for the base model, whether the server omits the field or sends it empty."""
    ref = response.adapter
    return AdapterRef(task_id=ref.task_id, version=ref.version, digest=ref.digest) if ref.task_id else None


def _finish_reason(value: int) -> FinishReason:
    name = enum_name(generation_pb2.FinishReason.Name, value, "FINISH_REASON_")
    return _FINISH_REASONS.get(name, FinishReason.UNSPECIFIED)


_FINISH_REASONS: Mapping[str, FinishReason] = MappingProxyType(
    {reason.value: reason for reason in FinishReason}
)
