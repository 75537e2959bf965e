"""Spans: one for each call, made of it when it has ended. All their names are here.

Only a server that exports traces imports this file. Never anything of a prompt or an answer.

Source: OpenTelemetry's semantic conventions for generative AI, which are in development, and for RPC (version 1.37).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from manyhats.adapters.errors import shown

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor

    from manyhats.server.observability.traceparent import Parent
    from manyhats.server.observability.work import Work
    from manyhats.server.service.call import Call

_PROVIDER = "manyhats"
# Kinds of work → the conventions' words. For others, the names of the API's methods are written in the same style.
_OPERATIONS: Mapping[str, str] = {"chat": "chat", "text": "text_completion", "embed": "embeddings"}
# Codes for which the server is to blame, or may be.
_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
_MAX_INT = 2**63
_Value = str | bool | int | float | list[str]


class Tracing:
    """Makes the spans of calls.

    Args:
        processor: gets them.
        version: of this server.
    """

    def __init__(self, processor: SpanProcessor, version: str) -> None:
        self._ids = _TraceIds()
        resource = Resource({SERVICE_NAME: _PROVIDER, SERVICE_VERSION: version}).merge(_given_resource())
        # At exit, whoever has opened this bounds the time that the last spans may take.
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(_PROVIDER, version)

    def record(self, call: Call, code: str) -> None:
        """Make the span of a call that has ended just now, with its status code."""
        zero_ns = time.time_ns() - time.monotonic_ns()  # on the wall's clock, when the other was 0
        self._ids.trace_id = int(call.trace_id, 16)
        span = self._tracer.start_span(
            _name(call),
            context=None if call.parent is None else _context(call.parent),
            kind=SpanKind.SERVER,
            attributes=dict(_attributes(call, code)),
            start_time=zero_ns + _ns(call.received_s),
        )
        for name, time_s in (("queued", call.work.queued_s), ("first_token", call.work.first_token_s)):
            if time_s is not None:
                span.add_event(name, timestamp=zero_ns + _ns(time_s))
        if code in _ERRORS:
            span.set_status(Status(StatusCode.ERROR))
        span.end(time.time_ns())

    def close(self) -> None:
        """Export what is left; takes as long as whoever gets it."""
        self._provider.shutdown()


class _TraceIds(RandomIdGenerator):
    """The ids of spans, and of traces that begin here: logs have had them since their calls began."""

    trace_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id


def _given_resource() -> Resource:
    """What the environment says of this process, by the variables that the library reads; else nothing."""
    found = Resource.create()
    name = str(found.attributes.get(SERVICE_NAME, ""))
    if not name.startswith("unknown_service"):
        return found
    return Resource({key: value for key, value in found.attributes.items() if key != SERVICE_NAME})


def _context(parent: Parent) -> Context:
    flags = TraceFlags(TraceFlags.SAMPLED if parent.is_sampled else TraceFlags.DEFAULT)
    span = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)
    return trace.set_span_in_context(trace.NonRecordingSpan(span))


def _name(call: Call) -> str:
    named = shown(call.name or call.work.base)
    operation = _operation(call) if call.work.kind else call.method
    return f"{operation} {named}" if named else operation


def _operation(call: Call) -> str:
    """The word for what the engine did."""
    own = re.sub("(?<=[a-z])(?=[A-Z])", "_", call.method).lower()
    return _OPERATIONS.get(call.work.kind, own)


def _attributes(call: Call, code: str) -> Iterator[tuple[str, _Value]]:
    yield "manyhats.method", call.method
    yield "manyhats.request_id", call.request_id or call.id
    if code != "OK":
        yield "error.type", code
    if call.name:
        yield "gen_ai.request.model", shown(call.name)
    if call.work.kind:
        yield "gen_ai.operation.name", _operation(call)
        yield "gen_ai.provider.name", _PROVIDER
        yield from _work_attributes(call.work)
        yield "gen_ai.response.model", call.work.base if call.version is None else call.version.name


def _work_attributes(work: Work) -> Iterator[tuple[str, _Value]]:
    if work.sampling is not None:
        yield "gen_ai.request.temperature", work.sampling.temperature
        yield "gen_ai.request.top_p", work.sampling.top_p
        seed = work.sampling.seed
        if seed is not None:  # of 64 bits without a sign, where an attribute has one
            yield "gen_ai.request.seed", seed if seed < _MAX_INT else seed - 2 * _MAX_INT
    if work.stopping is not None:
        yield "gen_ai.request.max_tokens", work.stopping.max_new_tokens
    if work.finish_reasons:
        yield "gen_ai.response.finish_reasons", [each.value for each in work.finish_reasons]
    yield "gen_ai.usage.input_tokens", work.prompt_tokens
    yield "gen_ai.usage.output_tokens", work.generated_tokens
    yield "manyhats.cached_prompt_tokens", work.cached_prompt_tokens
    for name, seconds in (
        ("queue", work.queue_s),
        ("adapter_load", work.adapter_load_s),
        ("prefill", work.prefill_s),
        ("decode", work.decode_s),
    ):
        yield f"manyhats.{name}_ms", round(1000 * seconds, 3)


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)
