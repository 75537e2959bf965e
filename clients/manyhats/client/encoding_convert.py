"""Requests and responses of the calls that read texts. Pure; both clients use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from manyhats.client.convert import adapter_ref, usage
from manyhats.client.encoding_results import (
    Classification,
    ClassifyResult,
    ClassScore,
    Embeddings,
    Entity,
    RankedText,
    RerankResult,
    TaggedText,
    TagResult,
    TokenClass,
)
from manyhats.client.fields import assign, enum_value
from manyhats.client.prompt_convert import set_prompt
from manyhats.client.requests import (
    ClassifyOptions,
    EmbedOptions,
    RerankOptions,
    TagOptions,
    TextToRead,
)
from manyhats.v1 import adapter_pb2, encoding_pb2

_InputsRequest: TypeAlias = (
    encoding_pb2.EmbedRequest | encoding_pb2.ClassifyRequest | encoding_pb2.ClassifyTokensRequest
)
_EncodingRequest: TypeAlias = _InputsRequest | encoding_pb2.RerankRequest

# The enums of options that are given by name, and what the names of their values begin with.
_ENUMS = {
    "pooling": (adapter_pb2.Pooling, "POOLING_"),
    "truncation": (encoding_pb2.Truncation, "TRUNCATION_"),
    "aggregation": (encoding_pb2.Aggregation, "AGGREGATION_"),
}


# Requests.


def embed_request(
    texts: Iterable[TextToRead], task_id: str, options: Mapping[str, object]
) -> encoding_pb2.EmbedRequest:
    """The request of ``embed``.

    Raises:
        InvalidRequestError: a value does not fit its field.
        TypeError: there is no option of that name, or one text is given instead of several.
    """
    request = encoding_pb2.EmbedRequest(task_id=task_id)
    _set_inputs(request, texts)
    _set_options(request, options, EmbedOptions, "embed")
    return request


def classify_request(
    texts: Iterable[TextToRead], task_id: str | Sequence[str], options: Mapping[str, object]
) -> encoding_pb2.ClassifyRequest:
    """The request of ``classify``; raises as ``embed_request`` does."""
    request = encoding_pb2.ClassifyRequest()
    assign(request, "task_ids", task_id, "task_ids")
    _set_inputs(request, texts)
    _set_options(request, options, ClassifyOptions, "classify")
    return request


def tag_request(
    texts: Iterable[str], task_id: str, options: Mapping[str, object]
) -> encoding_pb2.ClassifyTokensRequest:
    """The request of ``tag``; raises as ``embed_request`` does."""
    request = encoding_pb2.ClassifyTokensRequest(task_id=task_id)
    _set_inputs(request, texts)
    _set_options(request, {"aggregation": "simple"} | dict(options), TagOptions, "tag")
    return request


def rerank_request(
    query: str, texts: Iterable[str], task_id: str, options: Mapping[str, object]
) -> encoding_pb2.RerankRequest:
    """The request of ``rerank``; raises as ``embed_request`` does."""
    _check_several(texts)
    request = encoding_pb2.RerankRequest(task_id=task_id)
    assign(request, "query", query, "query")
    assign(request, "texts", texts, "texts")
    _set_options(request, options, RerankOptions, "rerank")
    return request


def _set_inputs(request: _InputsRequest, texts: Iterable[Any]) -> None:
    _check_several(texts)
    for index, text in enumerate(texts):
        added, path = request.inputs.add(), f"inputs[{index}]"
        if isinstance(text, tuple) and len(text) == 2 and isinstance(text[0], str):
            assign(added, "text", text[0], f"{path}.text")
            assign(added, "text_pair", text[1], f"{path}.text_pair")
        else:
            set_prompt(added, text, path)


def _check_several(texts: object) -> None:
    if isinstance(texts, str):
        raise TypeError("texts must be several, not one text; [text] is a list of it")


def _set_options(request: _EncodingRequest, options: Mapping[str, Any], known: type, method: str) -> None:
    for name, value in options.items():
        if name not in known.__annotations__:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        if value is None:
            continue
        if name in _ENUMS:
            value = enum_value(*_ENUMS[name], value, name)
        assign(request, name, value, name)


# Responses.


def embeddings(response: encoding_pb2.EmbedResponse) -> Embeddings:
    """Vectors, in the order requested."""
    return Embeddings(
        values=[list(each.values) for each in response.embeddings],
        num_tokens=tuple(each.num_tokens for each in response.embeddings),
        usage=usage(response.usage),
        base_digest=response.base_digest,
        adapter=adapter_ref(response),
        request_id=response.request_id,
    )


def classify_result(response: encoding_pb2.ClassifyResponse) -> ClassifyResult:
    """Classes, in the order requested."""
    return ClassifyResult(
        results=tuple(
            Classification(_classes(each.classes), each.num_tokens, adapter_ref(each))
            for each in response.results
        ),
        usage=usage(response.usage),
        request_id=response.request_id,
    )


def tag_result(response: encoding_pb2.ClassifyTokensResponse) -> TagResult:
    """Entities or tokens, in the order requested."""
    return TagResult(
        results=tuple(
            TaggedText(
                entities=tuple(
                    Entity(entity.label, entity.start, entity.end, entity.text, entity.score)
                    for entity in each.entities
                ),
                tokens=tuple(
                    TokenClass(token.token_index, token.start, token.end, _classes(token.classes))
                    for token in each.tokens
                ),
                num_tokens=each.num_tokens,
            )
            for each in response.results
        ),
        usage=usage(response.usage),
        adapter=adapter_ref(response),
        request_id=response.request_id,
    )


def rerank_result(response: encoding_pb2.RerankResponse) -> RerankResult:
    """Texts, the most relevant first."""
    return RerankResult(
        results=tuple(RankedText(each.index, each.score, each.text) for each in response.results),
        usage=usage(response.usage),
        adapter=adapter_ref(response),
        request_id=response.request_id,
    )


def _classes(scores: Iterable[encoding_pb2.ClassScore]) -> tuple[ClassScore, ...]:
    return tuple(ClassScore(each.label, each.index, each.score, each.logit) for each in scores)
