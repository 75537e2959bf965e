"""Plain values to request messages, and response messages to results. Pure; both clients use it.

``prompt_convert`` has what a prompt becomes, ``encoding_convert`` the calls that read texts, ``adapter_convert`` those
that manage adapters.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol

from manyhats.client.fields import assign, enum_name, invalid
from manyhats.client.prompt_convert import CHAT_OPTIONS, set_chat_option, set_prompt
from manyhats.client.requests import Continuation, Prompt
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
from manyhats.v1 import adapter_pb2, generation_pb2, server_pb2

_PROMPT_OPTIONS = ("request_id", "add_special_tokens", "cache_salt", "priority")
_CONSTRAINTS = tuple(
    field.name for field in generation_pb2.GenerateRequest.DESCRIPTOR.oneofs_by_name["constraint"].fields
)

# Where each option of `generate` goes in GenerateRequest; "" is the request itself.
_SECTIONS: Mapping[str, str] = MappingProxyType(
    {field.name: "sampling" for field in generation_pb2.SamplingParams.DESCRIPTOR.fields}
    | {field.name: "stopping" for field in generation_pb2.StoppingParams.DESCRIPTOR.fields}
    | {field.name: "response" for field in generation_pb2.ResponseOptions.DESCRIPTOR.fields}
    | dict.fromkeys((*_PROMPT_OPTIONS, "num_sequences"), "")
    | dict.fromkeys(CHAT_OPTIONS, "chat")
    | dict.fromkeys(_CONSTRAINTS, "constraint")
    | {"speculation": "speculation"}
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
    set_prompt(request, prompt)
    for name, value in options.items():
        if name not in _SECTIONS:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
        section = _SECTIONS[name]
        if section == "chat":
            set_chat_option(request, name, value)
        elif section == "constraint":
            _set_constraint(request, name, value)
        elif section == "speculation" and value is not None:
            assign(request.speculation, "num_tokens", value, "speculation.num_tokens")
        elif value is not None:
            message = getattr(request, section) if section else request
            assign(message, name, value, f"{section}.{name}" if section else name)
    return request


def _set_constraint(request: generation_pb2.GenerateRequest, name: str, value: Any) -> None:
    if value is None:
        return
    if other := request.WhichOneof("constraint"):
        raise invalid(name, f"is given besides {other}; an answer has at most one constraint")
    if name == "json_schema" and isinstance(value, Mapping):
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) == (name == "choice"):
        raise invalid(name, "must be several texts, not one" if name == "choice" else "must be a text")
    if name == "choice":
        request.choice.SetInParent()
        assign(request.choice, "options", value, name)
    else:
        assign(request, name, value, name)


def score_request(
    prompt: Prompt, continuations: Iterable[Continuation], task_id: str, options: Mapping[str, object]
) -> generation_pb2.ScoreRequest:
    """The request of ``score``; raises as ``generate_request`` does."""
    if isinstance(continuations, str):
        raise TypeError("continuations must be several texts or lists of token ids, not one text")
    request = generation_pb2.ScoreRequest(task_id=task_id)
    set_prompt(request, prompt)
    for index, continuation in enumerate(continuations):
        _set_content(request.continuations.add(), continuation, f"continuations[{index}]")
    for name, value in options.items():
        if name not in (*_PROMPT_OPTIONS, *CHAT_OPTIONS):
            raise TypeError(f"score() got an unexpected keyword argument {name!r}")
        if name in CHAT_OPTIONS:
            set_chat_option(request, name, value)
        elif value is not None:
            assign(request, name, value, name)
    return request


def tokenize_request(
    prompt: Prompt, task_id: str, add_special_tokens: bool | None, options: Mapping[str, object]
) -> generation_pb2.TokenizeRequest:
    """The request of ``tokenize``; raises as ``generate_request`` does."""
    request = generation_pb2.TokenizeRequest(task_id=task_id, add_special_tokens=add_special_tokens)
    set_prompt(request, prompt)
    for name, value in options.items():
        if name not in CHAT_OPTIONS:
            raise TypeError(f"tokenize() got an unexpected keyword argument {name!r}")
        set_chat_option(request, name, value)
    return request


def _set_content(message: generation_pb2.Continuation, content: Continuation, path: str) -> None:
    if isinstance(content, str):
        message.text = content
    else:
        message.token_ids.SetInParent()
        assign(message.token_ids, "ids", content, f"{path}.token_ids")


# Responses.


def generation(response: generation_pb2.GenerateResponse) -> Generation:
    """A whole answer."""
    first = Generation(
        text=response.text,
        tokens=_tokens(response.tokens),
        finish_reason=_finish_reason(response.finish_reason),
        usage=usage(response.usage),
        adapter=adapter_ref(response),
        prompt_tokens=_tokens(response.prompt_tokens),
        request_id=response.request_id,
    )
    more = tuple(
        replace(
            first,
            text=each.text,
            tokens=_tokens(each.tokens),
            finish_reason=_finish_reason(each.finish_reason),
            usage=usage(each.usage),
            prompt_tokens=(),
        )
        for each in response.more_sequences
    )
    return replace(first, more=more)


def generation_chunk(response: generation_pb2.GenerateStreamResponse) -> GenerationChunk:
    """A piece of a streamed answer."""
    ended = response.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED
    return GenerationChunk(
        text=response.text,
        tokens=_tokens(response.tokens),
        finish_reason=_finish_reason(response.finish_reason) if ended else None,
        usage=usage(response.usage) if response.HasField("usage") else None,
        adapter=adapter_ref(response),
        prompt_tokens=_tokens(response.prompt_tokens),
        request_id=response.request_id,
        sequence_index=response.sequence_index,
    )


def score_result(response: generation_pb2.ScoreResponse) -> ScoreResult:
    """Scores, in the order requested."""
    return ScoreResult(
        scores=tuple(
            Score(logprob=score.logprob, num_tokens=score.num_tokens, tokens=_tokens(score.tokens))
            for score in response.scores
        ),
        usage=usage(response.usage),
        adapter=adapter_ref(response),
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
        attention=response.attention,
        embedding_size=response.embedding_size,
        default_pooling=enum_name(adapter_pb2.Pooling.Name, response.default_pooling, "POOLING_"),
        services=tuple(response.services),
    )


def _limits(limits: server_pb2.ServerLimits) -> ServerLimits:
    values: dict[str, Any] = {
        field.name: None if field.has_presence else 0 for field in limits.DESCRIPTOR.fields
    }
    values |= {field.name: value for field, value in limits.ListFields()}
    return ServerLimits(**values)


def join_chunks(chunks: Sequence[GenerationChunk]) -> Generation:
    """The whole answer from a stream's chunks; for an interrupted stream, as much as there is."""
    by_sequence: defaultdict[int, list[GenerationChunk]] = defaultdict(list)
    for chunk in chunks:
        by_sequence[chunk.sequence_index].append(chunk)
    num_sequences = max(by_sequence, default=0) + 1
    first, *more = (_joined(by_sequence[index]) for index in range(num_sequences))
    return replace(first, more=tuple(more))


def _joined(chunks: Sequence[GenerationChunk]) -> Generation:
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


def usage(spent: generation_pb2.Usage) -> Usage:
    """What a request cost."""
    return Usage(
        prompt_tokens=spent.prompt_tokens,
        cached_prompt_tokens=spent.cached_prompt_tokens,
        generated_tokens=spent.generated_tokens,
        queue_ms=spent.queue_ms,
        prefill_ms=spent.prefill_ms,
        decode_ms=spent.decode_ms,
        adapter_load_ms=spent.adapter_load_ms,
        draft_tokens=spent.draft_tokens,
        accepted_draft_tokens=spent.accepted_draft_tokens,
    )


class NamesAdapter(Protocol):
    """A response that says which adapter answered."""

    @property
    def adapter(self) -> adapter_pb2.AdapterRef:
        """It."""


def adapter_ref(response: NamesAdapter) -> AdapterRef | None:
    """None for the base model, whether the server omits the field or sends it empty."""
    ref = response.adapter
    return AdapterRef(task_id=ref.task_id, version=ref.version, digest=ref.digest) if ref.task_id else None


def _finish_reason(value: int) -> FinishReason:
    name = enum_name(generation_pb2.FinishReason.Name, value, "FINISH_REASON_")
    return _FINISH_REASONS.get(name, FinishReason.UNSPECIFIED)


_FINISH_REASONS: Mapping[str, FinishReason] = MappingProxyType(
    {reason.value: reason for reason in FinishReason}
)
