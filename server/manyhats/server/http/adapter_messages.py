"""gRPC's messages about adapters and the server as JSON, by protobuf's mapping.

Names are in camel case, 64-bit numbers are texts, enums their values' names, times RFC 3339. Every field is written,
but those that are absent. https://protobuf.dev/programming-guides/json/
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, Struct, UnsetType

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.heads import Pooling
from manyhats.adapters.registration import OPTIONS, Part, Registration, source_of
from manyhats.engine.request import MAX_CONTINUATIONS
from manyhats.engine.residency.tiers import Tier

if TYPE_CHECKING:
    from manyhats.server.service.backend import Backend


class PartBody(Struct, rename="camel", forbid_unknown_fields=True):
    """One part of a composed task."""

    uri: str | None = None
    weight: float | None = None


class OptionsBody(Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """How to register."""

    validate_only: bool | None = None
    activate: bool | None = None
    expected_digest: str | None = None
    request_id: str | None = None
    labels: dict[str, str] | None = None
    assume_base: bool | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Those given, by the registration's names."""
        given = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in given.items() if value is not None}


class RegisterBody(OptionsBody, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """``RegisterAdapterRequest``."""

    task_id: str | None = None
    uri: str | None = None
    parts: list[PartBody] | None = None

    @property
    def registration(self) -> Registration:
        """What to register, and how.

        Raises:
            ArgumentInvalidError: a value is out of range.
        """
        parts = [
            Part(part.uri or "", 1.0 if part.weight is None else part.weight) for part in self.parts or ()
        ]
        return Registration(self.task_id or "", source_of(self.uri or "", parts), **self.options)


class ArtifactPartBody(Struct, rename="camel"):
    """``ArtifactPart``."""

    digest: str
    weight: float
    source: str
    text_files: tuple[str, ...]


class AdapterBody(Struct, rename="camel", kw_only=True):
    """``Adapter``: one version of a task."""

    task_id: str
    version: int
    digest: str
    method: str
    state: str
    state_reason: str
    size_bytes: str
    num_parameters: str
    source: str
    create_time: str
    base_model: str
    labels: dict[str, str]
    effect: float | UnsetType = UNSET
    residency: str
    notes: tuple[str, ...]
    parts: list[ArtifactPartBody]
    kind: str
    class_labels: tuple[str, ...]
    pooling: str
    pinned: bool


class AdapterAnswer(Struct):
    """``GetAdapterResponse``, and those of ``ActivateAdapter``, ``PinAdapter`` and ``UnpinAdapter``."""

    adapter: AdapterBody


class RegisterAnswer(Struct):
    """``RegisterAdapterResponse`` and ``UploadAdapterResponse``."""

    adapter: AdapterBody
    created: bool


class AdapterList(Struct, rename="camel"):
    """``ListAdaptersResponse``."""

    adapters: list[AdapterBody]
    next_page_token: str


class DeleteAnswer(Struct):
    """``DeleteAdapterResponse``."""

    adapters: list[AdapterBody]


class ServerInfo(Struct, rename="camel"):
    """``GetServerInfoResponse``."""

    version: str
    base_model: str
    base_digest: str
    quantization: str
    dtype: str
    device: str
    max_context_length: int
    vocab_size: int
    limits: dict[str, int | str]
    attention: str
    embedding_size: int
    default_pooling: str
    services: tuple[str, ...]


def adapter_body(record: AdapterRecord, tiers: Mapping[str, Tier]) -> AdapterBody:
    """A version; ``tiers`` says where digests are in memory."""
    tier = tiers.get(record.digest)
    return AdapterBody(
        task_id=record.task_id,
        version=record.version,
        digest=record.digest,
        method=f"ADAPTER_METHOD_{record.method.name}",
        state=f"ADAPTER_STATE_{record.state.name}",
        state_reason=record.state_reason,
        size_bytes=str(record.size_bytes),
        num_parameters=str(record.num_parameters),
        source=record.source,
        create_time=time_text(record.create_time),
        base_model=record.base_model,
        labels=dict(record.labels),
        effect=UNSET if record.effect is None else record.effect,
        residency=f"ADAPTER_RESIDENCY_{'DISK' if tier is None else tier.name}",
        notes=record.notes,
        parts=[
            ArtifactPartBody(part.digest, part.weight, part.source, part.text_files) for part in record.parts
        ],
        kind=f"TASK_KIND_{record.kind.name}",
        class_labels=record.class_names,
        pooling=_pooling(record.pooling),
        pinned=record.is_pinned,
    )


def _pooling(pooling: Pooling | None) -> str:
    """Nothing is pooled if each token is read by itself."""
    return f"POOLING_{'UNSPECIFIED' if pooling is None or pooling is Pooling.ALL else pooling.name}"


def server_info(backend: Backend, version: str, max_request_bytes: int) -> ServerInfo:
    """What this server is, and what callers may request."""
    info = backend.info
    limits = {
        "max_request_bytes": max_request_bytes,
        **backend.limits.shown(),
        "max_continuations": MAX_CONTINUATIONS,
    }
    return ServerInfo(
        version=version,
        base_model=info.name,
        base_digest=info.digest,
        quantization=info.quantization,
        dtype=info.dtype,
        device=info.device,
        max_context_length=backend.engine.max_context_length,
        vocab_size=info.vocab_size,
        limits={
            camel(name): str(value) if "bytes" in name else value
            for name, value in limits.items()
            if value is not None
        },
        attention=info.attention,
        embedding_size=info.embedding_size,
        default_pooling=_pooling(info.pooling),
        services=info.services,
    )


def time_text(time: datetime) -> str:
    """A time in RFC 3339, with as many digits of the second as protobuf writes: 0, 3 or 6."""
    utc = time.astimezone(UTC)
    digits = (
        "seconds" if not utc.microsecond else "microseconds" if utc.microsecond % 1000 else "milliseconds"
    )
    return utc.replace(tzinfo=None).isoformat(timespec=digits) + "Z"


def camel(name: str) -> str:
    """A field's name in JSON: ``parts[0].task_id`` is ``parts[0].taskId``."""
    first, *others = name.split("_")
    return first + "".join(other[:1].upper() + other[1:] for other in others)
