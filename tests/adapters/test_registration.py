"""A registration: what it accepts, and the fingerprint that catalogues remember it by."""

from __future__ import annotations

from typing import Any

import pytest

from manyhats.adapters.errors import ArgumentInvalidError, TaskIdInvalidError
from manyhats.adapters.registration import Files, Part, Parts, Registration, Source, UploadFile, Uri

URI = Uri("/adapters/sql")
PARTS = Parts([Part("/adapters/sql"), Part("/adapters/polite", 0.5)])
FILES = Files(
    [
        UploadFile("adapter_config.json", 523, "0b" * 32),
        UploadFile("adapter_model.safetensors", 1048576, "C4" * 32),
    ]
)
DIGEST = "sha256:" + "5e" * 32
EVERYTHING = {
    "activate": False,
    "validate_only": True,
    "expected_digest": DIGEST,
    "request_id": "r-1",
    "labels": {"b": "2", "a": "1"},
    "assume_base": True,
}
# Catalogues hold fingerprints of earlier versions of this software: a request id that was used then is known still.
RECORDED: list[tuple[Source, dict[str, Any], str]] = [
    (URI, {}, "17bfa754ff63c23051f54bf6871cbc555f3d92e1770d1f2607816355d4fed6fa"),
    (
        Uri("s3://bucket/adapters/größe"),
        {"task_id": "other.task-1"},
        "83ad5545ab9862d803b11558d7acf72437fa1cd18c5ec90610d770cd503a54e4",
    ),
    (URI, {"activate": False}, "2a897d52b212534c0d608b1d70943f0d8eb037fff2e834d62580aebc6d6f2045"),
    (URI, {"validate_only": True}, "5e51bfe54cf6070bd63c55a0c76db9c550e54bbf727fdbd6d038fef8d0fadc1f"),
    (
        URI,
        {"expected_digest": f"  {DIGEST.upper()}\n"},
        "c39b96327224640f44f09d96d430aa724b9f0b8b196e238d72b87210f4ae9ea9",
    ),
    (URI, {"request_id": "once"}, "17bfa754ff63c23051f54bf6871cbc555f3d92e1770d1f2607816355d4fed6fa"),
    (
        URI,
        {"labels": {"team": "data", "owner": "Zoë"}},
        "fe2fcfe7e1c026530946fe17e3a942c5884d2dec3582cbcc1e8d594279841ce3",
    ),
    (URI, {"assume_base": True}, "8fbdfc4384ea09ebb8ab3e7e67ee3bc0e249bbb6086472d0b026693a97f1ef35"),
    (URI, EVERYTHING, "4b98e9dfee404f79501a77608b1309502f804a21a9661a7fc886f9f4d354c546"),
    (PARTS, {}, "955dc0463bd650e504aa8aa6114a518210d98a1eb2f985897088224ce301bcb4"),
    (
        Parts([Part("/adapters/sql", -2), Part("/adapters/polite", 1e-3)]),
        {"labels": {"a": "b"}},
        "2a02fdbe53ba80f0976aef0cdcc403e36760b19020b089171946bd085cbde137",
    ),
    (PARTS, EVERYTHING, "357416dfcc592422b345c60a561946d69c1dbc8f19730376490103e576e2bd7e"),
    (FILES, {}, "12581e043aecd0f343eab12eeef6a5e4b6f17e7341d9849aab0239773fab5aba"),
    (
        FILES,
        {"expected_digest": "sha256:16dae5768fe3b5bd40fa3136c493ce0e36e8e2ded9e0f6a8d314e0945917de97"},
        "e1deb351f83fa12ec59c06e7d2008c27321500b79bc3a29ee7aa4fccd65089a6",
    ),
    (
        FILES,
        EVERYTHING
        | {"expected_digest": "sha256:16dae5768fe3b5bd40fa3136c493ce0e36e8e2ded9e0f6a8d314e0945917de97"},
        "09383dc7aeeee3c47988cebed8e30a794aa2d8ee36a90d857de331eb42bf1ff9",
    ),
]


@pytest.mark.parametrize(("source", "asked", "fingerprint"), RECORDED)
def test_fingerprints_are_those_that_catalogues_hold(
    source: Source, asked: dict[str, Any], fingerprint: str
) -> None:
    assert Registration(**({"task_id": "sql", "source": source} | asked)).fingerprint() == fingerprint


@pytest.mark.parametrize("request_id", ["x" * 129, "a\nb", "a\x00", "\ud800"])
def test_a_request_id_is_short_and_printable(request_id: str) -> None:
    with pytest.raises(ArgumentInvalidError):
        Registration("sql", URI, request_id=request_id)
    Registration("sql", URI, request_id="漢" * 128)


@pytest.mark.parametrize("source", [Uri(""), Parts([])])
def test_a_registration_has_a_source(source: Source) -> None:
    with pytest.raises(ArgumentInvalidError) as caught:
        Registration("sql", source)
    assert caught.value.subject == "uri"


def test_a_registration_names_a_task() -> None:
    with pytest.raises(TaskIdInvalidError):
        Registration("../sql", URI)


def test_stop_sequences_alone_may_have_line_breaks() -> None:
    kept = Registration("sql", URI, labels={"default.stop.0": "a\n\t\r"}).labels
    assert kept == {"default.stop.0": "a\n\t\r"}
    for labels in ({"note": "a\nb"}, {"default.stop.0": "a\x1b[31m"}, {"default.stop.0\n": "a"}):
        with pytest.raises(ArgumentInvalidError):
            Registration("sql", URI, labels=labels)


def test_nobody_changes_what_was_asked() -> None:
    labels, parts = {"a": "b"}, [Part("x")]
    registration = Registration("sql", Parts(parts), labels=labels)
    before = registration.fingerprint()
    labels["c"] = "d"
    parts.append(Part("y"))
    assert registration.fingerprint() == before
    assert registration.labels == {"a": "b"}
