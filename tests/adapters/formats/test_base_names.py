"""The base that an artifact records: a name that must be the base's, or a path that tells nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.errors import BaseMismatchError
from manyhats.adapters.formats.base_name import check_base_name, is_path, names_of_directory
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base, make_lora

BASE = make_base(names=("org/tiny",))

PATHS = (
    "/models/tiny",
    "/tiny",
    "//server/tiny",
    ".",
    "..",
    "./tiny",
    "../tiny",
    ".cache/tiny",
    "~",
    "~/tiny",
    "~somebody/tiny",
    "tiny",
    "my model",
    "checkpoint-100",
    "a/b/c",
    "outputs/run 1/checkpoint-100",
    "models/tiny/",
    "tiny/",
    "C:\\models\\tiny",
    "C:/tiny",
    "c:tiny/base",
    "\\\\server\\share\\tiny",
    "models\\tiny",
    "..\\models\\tiny",
    "outputs\\run/checkpoint",
    "модели",
)
NAMES = (
    "other/large",
    "models/tiny",
    "outputs/checkpoint-100",
    "оrg/tiny",  # the first letter is Cyrillic
    "org/tıny",
    "org /tiny",
    "org/ tiny",
    "my models/tiny",
    "org/tiny:main",
    "org/tiny@main",
    "org/tiny-instruct",
    "org/tiny.v2",
    "org_/tiny",
    "組織/模型",
    "-org/tiny",
    "_/_",
    "!/?",
    "org/tiny-v\u0131",
    "org/tiny’s",
    "org／a/tiny",
    "0/0",
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterStore:
    """A store whose process runs in an empty directory."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return open_store(tmp_path / "store", BASE, [tmp_path])


def record(tmp_path: Path, name: str) -> str:
    return str(make_lora(tmp_path / "a", BASE, base_model_name_or_path=name))


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_accepted_on_the_shapes_and_noted(store: AdapterStore, tmp_path: Path, name: str) -> None:
    registered = store.register(Registration("task", Uri(record(tmp_path, name)))).record
    assert registered.base_model == name
    assert [note for note in registered.notes if "by a path" in note] == list(registered.notes) != []


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_the_bases_is_refused_with_what_to_do(
    store: AdapterStore, tmp_path: Path, name: str
) -> None:
    with pytest.raises(BaseMismatchError, match=r"--assume-base.*--base-name") as caught:
        store.register(Registration("task", Uri(record(tmp_path, name))))
    assert caught.value.subject == "base_model_name_or_path"


@pytest.mark.parametrize("name", NAMES)
def test_what_looks_like_a_name_and_is_there_is_a_path(
    store: AdapterStore, tmp_path: Path, name: str
) -> None:
    (tmp_path / "cwd" / name).mkdir(parents=True)
    registered = store.register(Registration("task", Uri(record(tmp_path, name)))).record
    assert "by a path" in registered.notes[0]
    store.lower(registered)


def test_a_relative_path_that_was_there_is_served_when_it_is_gone(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd" / "models" / "tiny").mkdir(parents=True)
    store.register(Registration("task", Uri(record(tmp_path, "models/tiny"))))
    store.close()
    monkeypatch.chdir(tmp_path)
    reopened = open_store(tmp_path / "store", BASE, [tmp_path])
    reopened.lower(reopened.get("task"))


_WORDS = st.text(
    st.characters(exclude_characters="/\\\0", exclude_categories=("Cs",)), min_size=1, max_size=20
)


@given(_WORDS, _WORDS)
def test_two_parts_with_one_slash_are_a_name_whatever_they_are_made_of(first: str, second: str) -> None:
    name = f"{first}/{second}"
    is_absolute = first[0] in ".~" or (
        len(first) > 1 and first[0].isascii() and first[0].isalpha() and first[1] == ":"
    )
    if is_absolute or is_path(name):
        return
    with pytest.raises(BaseMismatchError):
        check_base_name(name, BASE)
    assert check_base_name(name, replace(BASE, names=frozenset((name,)))) == ()


@given(st.lists(_WORDS, min_size=3, max_size=6), st.sampled_from(["", "/", "./", "../", "~/", "C:\\", "C:/"]))
def test_more_parts_are_a_path(parts: list[str], start: str) -> None:
    assert is_path(start + "/".join(parts))


@pytest.mark.parametrize("name", NAMES)
def test_the_caller_may_say_that_the_base_is_meant(store: AdapterStore, tmp_path: Path, name: str) -> None:
    registered = store.register(Registration("task", Uri(record(tmp_path, name)), assume_base=True)).record
    assert registered.base_model == name
    assert "assume_base" in registered.notes[0]
    store.lower(registered)


def test_shapes_must_fit_though_the_base_is_meant(store: AdapterStore, tmp_path: Path) -> None:
    wide = make_base(names=("other/wide",), hidden_size=64)
    make_lora(tmp_path / "wide", wide)
    with pytest.raises(BaseMismatchError, match="no tensor fits"):
        store.register(Registration("task", Uri(str(tmp_path / "wide")), assume_base=True))


def test_a_part_may_be_meant_for_the_base_too(store: AdapterStore, tmp_path: Path) -> None:
    make_lora(tmp_path / "one", BASE)
    make_lora(tmp_path / "two", BASE, seed=1, base_model_name_or_path="other/large")
    parts = [Part(str(tmp_path / name)) for name in ("one", "two")]
    with pytest.raises(BaseMismatchError, match=r"^parts\[1\]"):
        store.register(Registration("task", Parts(parts)))
    registered = store.register(Registration("task", Parts(parts), assume_base=True)).record
    store.lower(registered)


def test_what_was_said_at_registration_holds_after_a_restart_on_the_same_base_alone(
    store: AdapterStore, tmp_path: Path
) -> None:
    store.register(Registration("task", Uri(record(tmp_path, "other/large")), assume_base=True))
    store.close()
    renamed = replace(BASE, names=frozenset(("renamed",)))
    for base in (
        BASE,
        renamed,
        replace(BASE, digest="sha256:" + "1" * 64),
    ):  # other names, or other quantization
        reopened = open_store(tmp_path / "store", base, [tmp_path])
        reopened.lower(reopened.get("task"))
        reopened.close()
    another = open_store(tmp_path / "store", replace(renamed, digest="sha256:" + "2" * 64), [tmp_path])
    with pytest.raises(BaseMismatchError):
        another.lower(another.get("task"))
    # The same files again, now meant for this one.
    assert not another.register(Registration("task", Uri(str(tmp_path / "a")), assume_base=True)).created
    another.lower(another.get("task"))
    another.close()
    for base in (BASE, renamed):
        reopened = open_store(tmp_path / "store", base, [tmp_path])
        reopened.lower(reopened.get("task"))
        reopened.close()


def test_the_same_request_id_with_another_meaning_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    from manyhats.adapters.errors import RequestIdReusedError

    uri = record(tmp_path, "other/large")
    first = store.register(Registration("task", Uri(uri), assume_base=True, request_id="one"))
    assert (
        store.register(Registration("task", Uri(uri), assume_base=True, request_id="one")).record.name
        == first.record.name
    )
    with pytest.raises(RequestIdReusedError):
        store.register(Registration("task", Uri(uri), request_id="one"))


@pytest.mark.parametrize(
    "spelled", ["base", "./base", "../here/base", "link", "{tmp}/here/base", "base/", "{tmp}/here/link/"]
)
@pytest.mark.parametrize("recorded", ["given", "{tmp}/here/base", "{tmp}/here/base/"])
def test_a_local_base_is_known_by_its_path_as_given_absolute_and_through_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str, recorded: str
) -> None:
    (tmp_path / "here" / "base").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to("base")
    monkeypatch.chdir(tmp_path / "here")
    given_path = spelled.format(tmp=tmp_path)
    base = replace(BASE, names=names_of_directory(given_path))
    name = given_path if recorded == "given" else recorded.format(tmp=tmp_path)
    assert check_base_name(name, base) == ()


def test_callers_are_not_told_the_servers_paths(tmp_path: Path) -> None:
    base = replace(BASE, names=BASE.names | names_of_directory(str(tmp_path)))
    with pytest.raises(BaseMismatchError, match="known as org/tiny;") as caught:
        check_base_name("other/large", base)
    assert str(tmp_path) not in str(caught.value)


def test_records_of_before_say_nothing_of_their_base_and_are_read(
    store: AdapterStore, tmp_path: Path
) -> None:
    from manyhats.adapters.store.catalogue.rows import read_record, record_document

    document = record_document(store.register(Registration("task", Uri(record(tmp_path, "org/tiny")))).record)
    del document["registered_for"]
    old = read_record(json.loads(json.dumps(document)))
    assert old.registered_for == ()
    store.lower(old)
