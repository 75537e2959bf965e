"""Text files of an artifact: kept with the version, part of its digest, bounded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import pytest

from manyhats.adapters.disk.digest import artifact_digest
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    ArgumentInvalidError,
    ArtifactError,
)
from manyhats.adapters.formats.text_files import MAX_BYTES
from manyhats.adapters.lowering.inspect import inspect
from manyhats.adapters.registration import Files, Part, Parts, Registration, Uri
from manyhats.adapters.sites import TextFacts
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base
from support.factories.uploads import announced, content_of, send

TEXT = {
    "added_tokens.json": '{"<tool>": 64}',
    "chat_template.jinja": "{{ messages[0].content }}é",
    "special_tokens_map.json": '{"eos_token": "</s>"}',
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "x"}]}',
}
PREFIX = "memory://bucket/adapters/"


def write_text(directory: Path, text: Mapping[str, str] = TEXT) -> None:
    for name, content in text.items():
        (directory / name).write_text(content, encoding="utf-8")
    (directory / "README.md").write_text("no part of the artifact")
    (directory / "vocab.json").write_text("neither")


def meaning(files: Mapping[str, bytes | bytearray]) -> TextFacts:
    """Text files mean what their template is; one that begins with "base" is the base's."""
    template = bytes(files.get("chat_template.jinja", b""))
    if template.startswith(b"bad"):
        raise AdapterInvalidError("chat_template.jinja", "is bad")
    own = "" if not template or template.startswith(b"base") else hashlib.sha256(template).hexdigest()
    return TextFacts(own, ("has text of its own",) if own else ())


@pytest.fixture
def checking(tmp_path: Path, sources: Path) -> AdapterStore:
    """A store whose base knows what text files mean."""
    return open_store(
        tmp_path / "checking", replace(make_base(names=("org/tiny",)), check_text=meaning), [sources]
    )


def test_an_artifact_without_text_files_keeps_its_digest(store: AdapterStore) -> None:
    config = {"peft_type": "LORA", "r": 2}
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": b"\0" * 16}
    recorded = "sha256:89852371c494e60fa508a1fd9d0bb8790f1783f638dd6b0f66f3ba52c54679ee"
    assert artifact_digest(files) == recorded
    record = store.register(Registration("fr", Uri("a0"))).record
    assert record.parts[0].text_files == ()
    assert record.text == ""


def test_text_files_are_kept_and_part_of_the_digest(
    store: AdapterStore, sources: Path, tmp_path: Path
) -> None:
    plain = store.register(Registration("fr", Uri("a0"))).record
    write_text(sources / "a0")
    record = store.register(Registration("fr", Uri("a0"))).record
    assert (record.version, record.parts[0].text_files) == (2, tuple(sorted(TEXT)))
    kept = {name: (sources / "a0" / name).read_bytes() for name in TEXT}
    assert plain.size_bytes + sum(map(len, kept.values())) == record.size_bytes
    assert record.digest != plain.digest
    (files,) = store.read_text(record)
    assert files == kept
    assert store.read_text(plain) == ()
    assert store.lower(record).digest == record.digest
    written = store.export("fr@2", tmp_path / "exported")
    assert {path.name for path in written} == {"adapter_config.json", "adapter_model.safetensors", *TEXT}
    assert store.register(Registration("de", Uri(str(sources / "a0")))).record.digest == record.digest


@pytest.mark.parametrize("name", sorted(TEXT))
def test_each_text_file_alone_changes_the_digest(store: AdapterStore, sources: Path, name: str) -> None:
    digests = set()
    for content in (None, TEXT[name], TEXT[name] + " "):
        if content is not None:
            (sources / "a0" / name).write_text(content, encoding="utf-8")
        digests.add(store.register(Registration("fr", Uri("a0"))).record.digest)
    assert len(digests) == 3


def test_an_upload_with_text_files_is_what_registration_makes_of_them(
    store: AdapterStore, sources: Path
) -> None:
    write_text(sources / "a0")
    registered = store.register(Registration("fr", Uri("a0"))).record
    content = {
        name: data
        for name, data in content_of(sources / "a0").items()
        if name not in ("README.md", "vocab.json")
    }
    uploaded = send(store, "de", content).record
    assert (uploaded.digest, uploaded.parts[0].text_files) == (registered.digest, tuple(sorted(TEXT)))


def test_an_upload_of_other_files_is_refused(store: AdapterStore, sources: Path) -> None:
    content = dict(content_of(sources / "a0"))
    with pytest.raises(ArgumentInvalidError) as refused:
        store.open_upload(Registration("fr", Files(announced({**content, "vocab.json": b"{}"}))))
    assert refused.value.subject == "files[2].name"
    with pytest.raises(ArgumentInvalidError):
        store.open_upload(Registration("fr", Files(announced({**content, "chat_template.jinja": b"x"}) * 2)))


def test_a_url_gives_its_text_files(tmp_path: Path, sources: Path) -> None:
    write_text(sources / "a0")
    files = fsspec.filesystem("memory")
    for name, content in content_of(sources / "a0").items():
        files.pipe_file(f"/bucket/adapters/fr/{name}", content)
    store = open_store(tmp_path / "urls", make_base(names=("org/tiny",)), [sources], url_prefixes=[PREFIX])
    try:
        fetched, local = (
            store.register(Registration("fr", Uri(PREFIX + "fr"))).record,
            store.register(Registration("de", Uri("a0"))).record,
        )
        assert (fetched.digest, fetched.parts[0].text_files) == (local.digest, tuple(sorted(TEXT)))
    finally:
        store.close()
        files.store.clear()


def test_a_restarted_store_and_another_process_know_them(tmp_path: Path, sources: Path) -> None:
    write_text(sources / "a0")
    base = replace(make_base(names=("org/tiny",)), check_text=meaning)
    first = open_store(tmp_path / "shared", base, [sources])
    second = open_store(tmp_path / "shared", base, [sources])
    record = first.register(Registration("fr", Uri("a0"), request_id="once")).record
    second.refresh()
    third = open_store(tmp_path / "shared", base, [sources])
    for store in (second, third):
        assert store.get("fr") == record
        assert store.read_text(store.get("fr")) == first.read_text(record)
    assert third.register(Registration("fr", Uri("a0"), request_id="once")).record == record
    assert [found.status for found in third.verify()] == ["ok"]
    assert record.text == hashlib.sha256(TEXT["chat_template.jinja"].encode()).hexdigest()
    for store in (first, second, third):
        store.close()


def test_an_object_store_keeps_them(tmp_path: Path, sources: Path) -> None:
    write_text(sources / "a0")
    open_remote = partial(
        open_store,
        "memory://bucket/texts/",
        make_base(names=("org/tiny",)),
        [sources],
        catalogue_url=f"sqlite:///{tmp_path / 'catalogue.db'}",
    )
    try:
        first = open_remote(cache_directory=tmp_path / "cache")
        record = first.register(Registration("fr", Uri("a0"))).record
        first.close()
        again = open_remote(cache_directory=tmp_path / "another cache")
        assert again.read_text(again.get("fr")) == ({name: TEXT[name].encode() for name in TEXT},)
        assert again.get("fr") == record
        again.close()
    finally:
        fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("name", sorted(TEXT))
def test_text_files_are_bounded(store: AdapterStore, sources: Path, name: str) -> None:
    with (sources / "a0" / name).open("wb") as file:
        file.truncate(MAX_BYTES[name] + 1)
    with pytest.raises(AdapterTooLargeError) as refused:
        store.register(Registration("fr", Uri("a0")))
    assert refused.value.subject == name
    big = announced(content_of(sources / "a1"))
    with pytest.raises(AdapterTooLargeError) as refused:
        store.open_upload(
            Registration("fr", Files([*big, replace(big[0], name=name, size_bytes=MAX_BYTES[name] + 1)]))
        )
    assert refused.value.subject == name


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"a": 1, "a": 2}'),
        ("special_tokens_map.json", b"[" * 100_000),
        ("added_tokens.json", b'{"a": NaN}'),
    ],
)
def test_malformed_text_files_are_refused_by_name(
    store: AdapterStore, sources: Path, name: str, content: bytes
) -> None:
    (sources / "a0" / name).write_bytes(content)
    with pytest.raises(ArtifactError) as refused:
        store.register(Registration("fr", Uri("a0")))
    assert refused.value.subject == name
    assert [(each.reason, each.subject) for each in inspect(sources / "a0").refusals] == [
        (refused.value.reason, name)
    ]


def test_a_text_file_that_is_no_regular_file_is_refused(store: AdapterStore, sources: Path) -> None:
    (sources / "a0" / "tokenizer.json").mkdir()
    with pytest.raises(AdapterUnsafeError, match=r"tokenizer\.json"):
        store.register(Registration("fr", Uri("a0")))


def test_what_the_base_cannot_use_is_refused(checking: AdapterStore, sources: Path) -> None:
    write_text(sources / "a0", {"chat_template.jinja": "bad"})
    with pytest.raises(AdapterInvalidError, match=r"chat_template\.jinja: is bad"):
        checking.register(Registration("fr", Uri("a0")))


def test_a_version_says_what_its_text_means(checking: AdapterStore, sources: Path) -> None:
    write_text(sources / "a0", {"chat_template.jinja": "own"})
    write_text(sources / "a1", {"chat_template.jinja": "base's"})
    own, same = (
        checking.register(Registration("fr", Uri("a0"))).record,
        checking.register(Registration("de", Uri("a1"))).record,
    )
    assert (own.text, "has text of its own" in own.notes) == (hashlib.sha256(b"own").hexdigest(), True)
    assert (same.text, same.parts[0].text_files) == ("", ("chat_template.jinja",))


def test_parts_of_a_composed_task_must_agree_in_their_text(checking: AdapterStore, sources: Path) -> None:
    write_text(sources / "a0", {"chat_template.jinja": "own"})
    write_text(sources / "a1", {"chat_template.jinja": "base's"})
    write_text(sources / "a2", {"chat_template.jinja": "own", "special_tokens_map.json": "{}"})
    agreeing = [Part(name) for name in ("a0", "a1", "a2", "a3")]
    record = checking.register(Registration("all", Parts(agreeing))).record
    assert record.text == hashlib.sha256(b"own").hexdigest()
    assert [part.text_files for part in record.parts] == [
        ("chat_template.jinja",),
        ("chat_template.jinja",),
        ("chat_template.jinja", "special_tokens_map.json"),
        (),
    ]
    assert len(checking.read_text(record)) == 3
    write_text(sources / "a3", {"chat_template.jinja": "another"})
    with pytest.raises(AdapterUnsupportedError) as refused:
        checking.register(Registration("all", Parts(agreeing)))
    assert refused.value.subject == "parts[3]"
    assert "differently from parts[0] (chat_template.jinja)" in refused.value.description


def test_inspect_names_text_files_and_gives_the_digest_of_registration(
    store: AdapterStore, sources: Path
) -> None:
    write_text(sources / "a0")
    found = inspect(sources / "a0")
    assert found.text_files == tuple(sorted(TEXT))
    assert found.digest == store.register(Registration("fr", Uri("a0"))).record.digest
