"""Registrations by request id: the same id and content again gets the first answer, and does nothing."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import ArgumentInvalidError, RequestIdReusedError

_MAX_ID_LENGTH = 128
_MAX_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Registration:
    """The answer to a registration; ``created`` is false where the version existed, or was validated only."""

    record: AdapterRecord
    created: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationBody:
    """Everything that a registration asks for."""

    task_id: str
    uri: str
    activate: bool
    validate_only: bool
    expected_digest: str
    labels: Mapping[str, str]

    def fingerprint(self) -> str:
        """One digest of all fields."""
        fields = [self.task_id, self.uri, self.activate, self.validate_only, self.expected_digest]
        return hashlib.sha256(json.dumps([*fields, sorted(self.labels.items())]).encode()).hexdigest()


def check_request_id(request_id: str) -> None:
    """Accept an id, or the empty one, which is remembered by nobody.

    Raises:
        ArgumentInvalidError: it is too long or not printable.
    """
    if len(request_id) > _MAX_ID_LENGTH or not request_id.isprintable():
        raise ArgumentInvalidError("request_id", f"has at most {_MAX_ID_LENGTH} printable characters")


class AnsweredRequests:
    """The latest answers by request id. Not safe across threads: its owner orders the calls."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, tuple[str, Registration]] = OrderedDict()

    def recall(self, request_id: str, body: RegistrationBody) -> Registration | None:
        """The answer that the id was given; None if it is new.

        Raises:
            RequestIdReusedError: it was used for something else.
        """
        if request_id not in self._answers:
            return None
        fingerprint, registration = self._answers[request_id]
        if fingerprint != body.fingerprint():
            raise RequestIdReusedError("request_id", "was used before, for a registration with other content")
        return registration

    def remember(self, request_id: str, body: RegistrationBody, registration: Registration) -> None:
        """Keep an answer; the oldest go."""
        if not request_id:
            return
        self._answers[request_id] = (body.fingerprint(), registration)
        if len(self._answers) > _MAX_REMEMBERED:
            self._answers.popitem(last=False)
