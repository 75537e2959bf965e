"""From the dataclasses of the domain to the messages of the API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from google.protobuf.timestamp_pb2 import Timestamp

from manyhats.adapters.artifact import AdapterMethod, AdapterRecord, AdapterState
from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.engine.output import (
    FinishReason,
    ScoreOutput,
    StepOutput,
    TokenOutput,
    Usage,
)
from manyhats.engine.request import MAX_CONTINUATIONS
from manyhats.engine.residency.tiers import Tier
from manyhats.server.service.readings import together
from manyhats.server.service.text_threads import ENTRY_WEIGHT, paced, paced_tokens, slices
from manyhats.v1 import adapter_pb2, encoding_pb2, generation_pb2, server_pb2

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    from manyhats.server.service.backend import Backend
    from manyhats.server.service.class_scores import Scored
    from manyhats.server.service.entities import Entity
    from manyhats.server.service.readings import (
        Classifications,
        Embeddings,
        Ranked,
        Tagged,
        TaggedToken,
    )

# How many of a vector's values take the time of a token to add to an answer.
VALUES_PER_ENTRY = 64


def generate_response(
    request_id: str, sequences: Sequence[Sequence[StepOutput]], adapter: AdapterRecord | None
) -> generation_pb2.GenerateResponse:
    """A whole answer from all outputs of each of its sequences, at least one."""
    response = generation_pb2.GenerateResponse(request_id=request_id, adapter=adapter_ref(adapter))
    first, *others = sequences
    _add_sequence(response, first)
    add_tokens(response.prompt_tokens, (token for output in first for token in output.prompt_tokens))
    for outputs in others:
        _add_sequence(response.more_sequences.add(), outputs)
    return response


def _add_sequence(
    message: generation_pb2.GenerateResponse | generation_pb2.GeneratedSequence, outputs: Sequence[StepOutput]
) -> None:
    message.text = "".join(output.text for output in outputs)
    message.finish_reason = finish_reason(outputs[-1].finish_reason)
    message.usage.CopyFrom(usage(outputs[-1].usage))
    add_tokens(message.tokens, (token for output in outputs for token in output.tokens))


def stream_response(
    request_id: str, output: StepOutput, adapter: AdapterRecord | None, *, index: int, is_first: bool
) -> generation_pb2.GenerateStreamResponse:
    """One piece of an answer: the first has adapter and prompt usage, the last has all usage and the finish reason.

    Args:
        index: which of a request's answers it belongs to.
    """
    response = generation_pb2.GenerateStreamResponse(
        request_id=request_id,
        text=output.text,
        sequence_index=index,
        usage=prompt_usage(output.usage) if is_first else None,
        adapter=adapter_ref(adapter) if is_first else None,
    )
    add_tokens(response.tokens, output.tokens)
    add_tokens(response.prompt_tokens, output.prompt_tokens)
    if output.finish_reason is not None:
        response.finish_reason = finish_reason(output.finish_reason)
        response.usage.CopyFrom(usage(output.usage))
    return response


def score_response(
    request_id: str, output: ScoreOutput, adapter: AdapterRecord | None
) -> generation_pb2.ScoreResponse:
    """The scores of one request."""
    response = generation_pb2.ScoreResponse(
        request_id=request_id, usage=usage(output.usage), adapter=adapter_ref(adapter)
    )
    for score in paced(output.scores, lambda each: ENTRY_WEIGHT * len(each.tokens)):
        scored = response.scores.add(logprob=score.logprob, num_tokens=len(score.tokens))
        add_tokens(scored.tokens, score.tokens)
    return response


def embed_response(request_id: str, found: Embeddings, base_digest: str) -> encoding_pb2.EmbedResponse:
    """The vectors of one request, in slices: other threads run in between."""
    response = encoding_pb2.EmbedResponse(
        request_id=request_id,
        usage=prompt_usage(found.usage),
        adapter=adapter_ref(found.adapter),
        base_digest=base_digest,
    )
    pairs = zip(found.vectors, found.num_tokens, strict=True)
    for vector, num_tokens in paced(pairs, lambda pair: len(pair[0]) // VALUES_PER_ENTRY):
        response.embeddings.add(values=vector.tolist(), num_tokens=num_tokens)
    return response


def classify_response(request_id: str, found: Sequence[Classifications]) -> encoding_pb2.ClassifyResponse:
    """What each of a request's tasks says of its texts, in slices: other threads run in between."""
    usages = [each.usage for each in found]
    response = encoding_pb2.ClassifyResponse(request_id=request_id, usage=prompt_usage(together(usages)))
    of_tasks = [zip(each.results, each.num_tokens, strict=True) for each in found]
    for of_text in paced(
        zip(*of_tasks, strict=True), lambda each: sum(ENTRY_WEIGHT * len(one[0].classes) for one in each)
    ):
        for each, (scored, num_tokens) in zip(found, of_text, strict=True):
            result = response.results.add(num_tokens=num_tokens, adapter=adapter_ref(each.adapter))
            _add_classes(result.classes, scored)
    return response


def tagged_response(request_id: str, found: Tagged[TaggedToken]) -> encoding_pb2.ClassifyTokensResponse:
    """The classes of texts' tokens, in slices: other threads run in between."""
    response = _tagged_texts(request_id, found)
    pairs = zip(response.results, found.results, strict=True)
    each_token = ((result, token) for result, tokens in pairs for token in tokens)
    for result, token in paced(each_token, lambda pair: ENTRY_WEIGHT * len(pair[1].scored.classes)):
        added = result.tokens.add(token_index=token.index, start=token.start, end=token.end)
        _add_classes(added.classes, token.scored)
    return response


def entities_response(request_id: str, found: Tagged[Entity]) -> encoding_pb2.ClassifyTokensResponse:
    """The entities in texts, in slices: other threads run in between."""
    response = _tagged_texts(request_id, found)
    pairs = zip(response.results, found.results, strict=True)
    each_entity = ((result, entity) for result, entities in pairs for entity in entities)
    for result, entity in paced(each_entity, lambda pair: ENTRY_WEIGHT):
        result.entities.add(
            label=entity.label, start=entity.start, end=entity.end, text=entity.text, score=entity.score
        )
    return response


def rerank_response(
    request_id: str, found: Ranked, texts: Sequence[str] | None
) -> encoding_pb2.RerankResponse:
    """The order of texts; ``texts`` are those to repeat, None for none."""
    response = encoding_pb2.RerankResponse(
        request_id=request_id, usage=prompt_usage(found.usage), adapter=adapter_ref(found.adapter)
    )
    for index, score in found.results:
        response.results.add(index=index, score=score, text="" if texts is None else texts[index])
    return response


def _tagged_texts(request_id: str, found: Tagged[Any]) -> encoding_pb2.ClassifyTokensResponse:
    """An answer whose texts are still empty."""
    response = encoding_pb2.ClassifyTokensResponse(
        request_id=request_id, usage=prompt_usage(found.usage), adapter=adapter_ref(found.adapter)
    )
    for num_tokens in found.num_tokens:
        response.results.add(num_tokens=num_tokens)
    return response


def _add_classes(messages: RepeatedCompositeFieldContainer[encoding_pb2.ClassScore], scored: Scored) -> None:
    for each in scored.classes:
        messages.add(label=each.label, index=each.index, score=each.score, logit=each.logit)


def tokenize_response(ids: Sequence[int], pieces: Sequence[str]) -> generation_pb2.TokenizeResponse:
    """Token ids and the text of each, in slices: other threads run in between."""
    response = generation_pb2.TokenizeResponse()
    for part in slices(range(len(ids))):
        response.ids.extend(ids[part[0] : part[-1] + 1])
        response.pieces.extend(pieces[part[0] : part[-1] + 1])
    return response


def add_tokens(
    infos: RepeatedCompositeFieldContainer[generation_pb2.TokenInfo], tokens: Iterable[TokenOutput]
) -> None:
    """Add tokens with what was requested besides them, in slices: other threads run in between."""
    for token in paced_tokens(tokens):
        info = infos.add(id=token.id, text=token.text, logprob=token.logprob, rank=token.rank)
        for each in token.top:
            info.top.add(id=each.id, text=each.text, logprob=each.logprob)


def usage(spent: Usage) -> generation_pb2.Usage:
    """What a request cost."""
    message = prompt_usage(spent)
    message.generated_tokens = spent.generated_tokens
    message.decode_ms = spent.decode_s * 1000
    message.draft_tokens = spent.draft_tokens
    message.accepted_draft_tokens = spent.accepted_draft_tokens
    return message


def prompt_usage(spent: Usage) -> generation_pb2.Usage:
    """What only the prompt cost."""
    return generation_pb2.Usage(
        prompt_tokens=spent.prompt_tokens,
        cached_prompt_tokens=spent.cached_prompt_tokens,
        queue_ms=spent.queue_s * 1000,
        prefill_ms=spent.prefill_s * 1000,
        adapter_load_ms=spent.adapter_load_s * 1000,
    )


_FINISH_REASONS = {
    reason: generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in FinishReason
}
_METHODS = {
    method: adapter_pb2.AdapterMethod.Value(f"ADAPTER_METHOD_{method.name}") for method in AdapterMethod
}
_RESIDENCIES = {
    Tier.DEVICE: adapter_pb2.ADAPTER_RESIDENCY_DEVICE,
    Tier.HOST: adapter_pb2.ADAPTER_RESIDENCY_HOST,
    None: adapter_pb2.ADAPTER_RESIDENCY_DISK,
}
_KINDS = {kind: adapter_pb2.TaskKind.Value(f"TASK_KIND_{kind.name}") for kind in TaskKind}
_POOLINGS = {
    each: adapter_pb2.Pooling.Value(f"POOLING_{each.name}") for each in Pooling if each is not Pooling.ALL
}
_STATES = {state: adapter_pb2.AdapterState.Value(f"ADAPTER_STATE_{state.name}") for state in AdapterState}


def finish_reason(reason: FinishReason | None) -> generation_pb2.FinishReason.ValueType:
    """Why a generation ended; unspecified while it continues."""
    return generation_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_REASONS[reason]


def pooling(value: Pooling | None) -> adapter_pb2.Pooling.ValueType:
    """What is read of hidden values; unspecified for nothing, and for each token by itself."""
    return adapter_pb2.POOLING_UNSPECIFIED if value in (None, Pooling.ALL) else _POOLINGS[value]


def adapter_ref(record: AdapterRecord | None) -> adapter_pb2.AdapterRef | None:
    """Which adapter served; None for the base model."""
    if record is None:
        return None
    return adapter_pb2.AdapterRef(task_id=record.task_id, version=record.version, digest=record.digest)


def adapter(record: AdapterRecord, tier: Tier | None) -> adapter_pb2.Adapter:
    """One version of a task's adapter; ``tier`` is where it is in memory, None if it is not."""
    created = Timestamp()
    created.FromDatetime(record.create_time)
    return adapter_pb2.Adapter(
        task_id=record.task_id,
        version=record.version,
        digest=record.digest,
        method=_METHODS[record.method],
        state=_STATES[record.state],
        state_reason=record.state_reason,
        size_bytes=record.size_bytes,
        num_parameters=record.num_parameters,
        source=record.source,
        create_time=created,
        base_model=record.base_model,
        labels=record.labels,
        effect=record.effect,
        residency=_RESIDENCIES[tier],
        notes=record.notes,
        parts=[
            adapter_pb2.ArtifactPart(
                digest=part.digest, weight=part.weight, source=part.source, text_files=part.text_files
            )
            for part in record.parts
        ],
        kind=_KINDS[record.kind],
        class_labels=record.class_names,
        pooling=pooling(record.pooling),
        pinned=record.is_pinned,
    )


def server_info(backend: Backend, version: str, max_request_bytes: int) -> server_pb2.GetServerInfoResponse:
    """What this server is, and what callers may request."""
    info = backend.info
    settings: dict[str, Any] = backend.limits.shown()
    limits = server_pb2.ServerLimits(
        **settings,
        max_request_bytes=max_request_bytes,
        max_continuations=MAX_CONTINUATIONS,
    )
    return server_pb2.GetServerInfoResponse(
        version=version,
        base_model=info.name,
        base_digest=info.digest,
        quantization=info.quantization,
        dtype=info.dtype,
        device=info.device,
        max_context_length=backend.engine.max_context_length,
        vocab_size=info.vocab_size,
        limits=limits,
        attention=info.attention,
        embedding_size=info.embedding_size,
        default_pooling=pooling(info.pooling),
        services=info.services,
    )
