"""The last steps of a registration: bytes first, then the catalogue's row; a failure leaves neither."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.adapters.errors import ArgumentInvalidError, DigestMismatchError, StoreError
from manyhats.adapters.heads import Pooling, ScoreActivation, TaskHead, TaskKind
from manyhats.adapters.limits import Quotas
from manyhats.adapters.lowering.validation import ValidVersion, measure
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.probe import Prepare, Probe
from manyhats.adapters.registration import Registered, Registration, check_labels
from manyhats.adapters.reserved_labels import (
    ACTIVATION,
    CLASS,
    MAX_CLASSES,
    label_error,
    listed,
    numbered,
    read_pooling,
)
from manyhats.adapters.store.artifacts.storage import ArtifactStorage
from manyhats.adapters.store.catalogue.catalogue import Catalogue


class Publisher:
    """Publishes valid versions. Thread-safe; several processes may publish to one store.

    Args:
        storage: holds the bytes.
        catalogue: holds the rows.
        quotas: limit what is published.
    """

    def __init__(self, storage: ArtifactStorage, catalogue: Catalogue, quotas: Quotas) -> None:
        self._storage = storage
        self._catalogue = catalogue
        self._quotas = quotas

    def recall(self, registration: Registration) -> Registered | None:
        """The earlier answer to the request id; None if the id is new.

        Raises:
            RequestIdReusedError: it was used for something else.
        """
        return self._catalogue.recall(registration)

    def check_quotas(self, task_id: str, digest: str, size_bytes: int) -> None:
        """Refuse early what ``publish`` would refuse: a new version over a quota.

        Raises:
            QuotaExceededError: ``subject`` is the quota.
        """
        if self._catalogue.find_digest(task_id, digest) is None:
            self._catalogue.check_quotas(task_id, size_bytes, self._quotas)

    def publish(
        self,
        valid: ValidVersion,
        registration: Registration,
        *,
        probe: Probe | None,
        prepare: Prepare | None,
    ) -> Registered:
        """Probe a version, store it and catalogue it; with ``validate_only``, return what it would be.

        Raises:
            DigestMismatchError: it is not the expected one.
            QuotaExceededError: it would be over a quota.
            AdapterInvalidError, AdapterNoEffectError: from the probe.
            RequestIdReusedError: the request id was used for something else in the meantime.
            StoreError: it could not be written; nothing is published.
        """
        if registration.expected_digest not in ("", valid.digest):
            raise DigestMismatchError("expected_digest", f"the adapter's digest is {valid.digest}")
        self.check_quotas(registration.task_id, valid.digest, valid.size_bytes)
        _check_classes(valid.lowered, registration.labels)
        effect = None if probe is None else measure(valid.lowered, probe)
        draft = _draft(valid, registration, effect)
        if registration.validate_only:
            existing = self._catalogue.find_digest(registration.task_id, valid.digest)
            return self._catalogue.remember(registration, Registered(existing or draft, created=False))
        with self._discarded_on_failure(valid.files), self._storage.publishing():
            for digest, files in valid.files.items():
                self._storage.publish(digest, files)
            if prepare is not None and registration.activate:
                prepare(draft, valid.lowered)
            return self._catalogue.add(draft, registration, self._quotas)

    @contextlib.contextmanager
    def _discarded_on_failure(self, digests: Collection[str]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # The database tells whether the row was committed; a sweep finds what cannot be removed now.
            with contextlib.suppress(StoreError):
                self._storage.remove(digests, self._catalogue.named)
            raise


def _check_classes(lowered: LoweredAdapter, labels: Mapping[str, str]) -> None:
    """Check what a registration says of classes against what the adapter has: a head's outputs, or none.

    Raises:
        ArgumentInvalidError: a head has more outputs, or fewer; without one, a single class is named, or how logits
            become scores.
    """
    names = listed(labels, CLASS)
    if lowered.head is None:
        if len(names) == 1:
            raise ArgumentInvalidError("labels", "name one class; a task without a head needs at least two")
        if ACTIVATION in labels:
            raise label_error(ACTIVATION, "needs a head, which the adapter does not have")
        return
    num_outputs = lowered.head.num_outputs
    if names and num_outputs and len(names) != num_outputs:
        raise ArgumentInvalidError(
            "labels", f"name {len(names)} classes; the adapter's head has {num_outputs}"
        )


def _labels(lowered: LoweredAdapter, labels: Mapping[str, str]) -> Mapping[str, str]:
    """The version's labels: the registration's, and of its classes and scores what only the adapter's own files say.

    Raises:
        ArgumentInvalidError: a class in the files cannot be a label.
    """
    head = lowered.head
    own: dict[str, str] = {}
    if head is not None and len(head.labels) <= MAX_CLASSES and not listed(labels, CLASS):
        own |= numbered(CLASS, head.labels)
    if head is not None and head.activation is ScoreActivation.SIGMOID:
        own[ACTIVATION] = head.activation.value
    return check_labels({**own, **labels}) if own else labels


def _pooling(head: TaskHead | None, labels: Mapping[str, str]) -> Pooling | None:
    """What a task reads of a text: its head's, or of vectors what the labels say."""
    if head is not None and head.kind is not TaskKind.EMBED:
        return head.pooling
    return read_pooling(labels) or (None if head is None else head.pooling)


def _draft(valid: ValidVersion, registration: Registration, effect: float | None) -> AdapterRecord:
    """The record as it will be, except version and state."""
    head = valid.lowered.head
    return AdapterRecord(
        task_id=registration.task_id,
        version=0,
        digest=valid.digest,
        method=valid.method,
        state=AdapterState.CREATING,
        parts=valid.parts,
        size_bytes=valid.size_bytes,
        num_parameters=valid.num_parameters,
        source=registration.source_name,
        create_time=datetime.now(UTC),
        base_model=valid.base_model,
        registered_for=valid.registered_for,
        labels=_labels(valid.lowered, registration.labels),
        effect=effect,
        notes=valid.notes,
        kind=TaskKind.GENERATE if head is None else head.kind,
        num_classes=0 if head is None else head.num_outputs,
        pooling=_pooling(head, registration.labels),
        text=valid.text,
    )
