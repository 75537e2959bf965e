"""What the doctor says of the store, its catalogue and the clock."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, text

from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.server.doctor.finding import Finding
from manyhats.server.doctor.store import extras_of, look_at_extras, look_at_store
from support.factories.adapters import make_base, make_lora
from support.harnesses.doctor import Make, bad, conditions, only
from support.servers.postgres import PostgresServer
from support.servers.s3 import Bucket

BASE = make_base()


@pytest.fixture
def in_s3(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.options["secret"])
    return bucket.url


def files_in(directory: Path) -> set[Path]:
    return {
        path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("catalogue.db-")
    }


def test_a_store_that_is_not_there_is_made_by_serve_and_not_by_the_doctor(make: Make, tmp_path: Path) -> None:
    finding = only(look_at_store(make()))
    assert (finding.condition.value, "the first start makes it" in finding.text) == ("ok", True)
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("as_nobody")
def test_a_place_where_no_store_can_be_made_fails(make: Make) -> None:
    assert only(look_at_store(make(store=Path("/proc/1/store")))).condition.value == "failure"


def test_a_sound_store_is_written_and_nothing_is_left(make: Make, tmp_path: Path) -> None:
    make_lora(tmp_path / "sql", BASE)
    store = open_store(tmp_path / "store", BASE, [tmp_path])
    store.register(Registration("sql", Uri(str(tmp_path / "sql"))))
    store.close()
    before = files_in(tmp_path / "store")
    tasks, finding = look_at_store(make())
    assert tasks == {"sql"}
    assert isinstance(finding, Finding)
    assert (finding.condition.value, "1 tasks; written, read and removed" in finding.text) == ("ok", True)
    assert files_in(tmp_path / "store") == before


def test_a_store_that_cannot_be_written_fails(
    make: Make, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    open_store(tmp_path / "store", BASE).close()
    for path in (tmp_path / "store").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "store").chmod(0o555)
    request.getfixturevalue("as_nobody")
    (finding,) = bad(look_at_store(make()))
    assert (finding.subject, finding.condition.value) == ("store", "failure")


def test_a_store_that_belongs_to_another_catalogue_fails(make: Make, tmp_path: Path) -> None:
    open_store(tmp_path / "store", BASE).close()
    other = f"sqlite:///{tmp_path}/other.db"
    open_store(tmp_path / "second", BASE, catalogue_url=other).close()
    (finding,) = bad(look_at_store(make(catalogue=other)))
    assert "another catalogue" in finding.text


def test_settings_of_the_store_that_do_not_go_together_fail(make: Make) -> None:
    (finding,) = bad(look_at_store(make(store="s3://bucket/store")))
    assert "catalogue: must be given" in finding.text


def test_object_storage_is_written_read_and_cleaned_up(
    make: Make, tmp_path: Path, in_s3: str, bucket: Bucket
) -> None:
    import fsspec

    config = make(store=in_s3, catalogue=f"sqlite:///{tmp_path}/c.db")
    found = conditions(look_at_store(config))
    assert found == [("catalogue", "ok"), ("store", "ok")]  # neither is there yet
    assert not (tmp_path / "c.db").exists()
    open_store(in_s3, BASE, catalogue_url=config.catalogue).close()
    assert conditions(look_at_store(config)) == [("store", "ok")]
    files = fsspec.filesystem("s3", **bucket.options, skip_instance_cache=True)
    assert files.find(f"{in_s3}/trials") == []


def test_object_storage_that_cannot_be_reached_fails(make: Make, tmp_path: Path, in_s3: str) -> None:
    config = make(store="s3://no-such-bucket/store", catalogue=f"sqlite:///{tmp_path}/c.db")
    (finding,) = bad(look_at_store(config))
    assert (finding.subject, finding.condition.value) == ("store", "failure")
    assert "no such bucket" in finding.text


@pytest.mark.postgres
def test_a_database_gets_no_tables_from_the_doctor(make: Make, postgres_url: str) -> None:
    config = make(catalogue=postgres_url)
    assert conditions(look_at_store(config)) == [("store", "ok"), ("catalogue", "ok")]
    engine = create_engine(postgres_url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()


@pytest.mark.postgres
def test_a_catalogue_whose_directory_is_gone_is_a_warning(
    make: Make, tmp_path: Path, postgres_url: str
) -> None:
    open_store(tmp_path / "store", BASE, catalogue_url=postgres_url).close()
    (finding,) = bad(look_at_store(make(catalogue=postgres_url, store=tmp_path / "elsewhere")))
    assert (finding.subject, finding.condition.value) == ("catalogue", "warning")
    assert "mounted" in finding.advice


@pytest.mark.postgres
def test_clocks_are_compared(make: Make, tmp_path: Path, postgres_url: str) -> None:
    open_store(tmp_path / "store", BASE, catalogue_url=postgres_url).close()
    config = make(catalogue=postgres_url)
    assert conditions(look_at_store(config)) == [("store", "ok"), ("clock", "ok")]
    # A database whose clock is wrong cannot be had here; its own function may say so.
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA wrong"))
        body = "SELECT pg_catalog.clock_timestamp() + interval '8 minutes'"
        function = "CREATE FUNCTION wrong.clock_timestamp() RETURNS timestamptz LANGUAGE sql"
        connection.execute(text(f"{function} AS $${body}$$"))
        connection.execute(text("ALTER ROLE test SET search_path = wrong, pg_catalog, public"))
    try:
        (finding,) = bad(look_at_store(config))
    finally:
        with engine.begin() as connection:
            connection.execute(text("ALTER ROLE test RESET search_path"))
        engine.dispose()
    assert (finding.subject, finding.condition.value) == ("clock", "failure")
    assert re.match(r"4(79|80)\.\d s behind the database's", finding.text)


@pytest.mark.postgres
def test_a_database_that_is_down_fails_with_what_it_said_and_no_password(
    make: Make, postgres_server: PostgresServer, postgres_url: str
) -> None:
    config = make(catalogue=postgres_url.replace("://test@", "://test:secret@"))
    assert ":secret@" in config.catalogue
    with postgres_server.stopped():
        (finding,) = bad(look_at_store(config))
    assert (finding.subject, finding.condition.value) == ("catalogue", "failure")
    assert "No such file or directory" in finding.text
    assert "secret" not in finding.text


def test_the_extras_that_urls_need(make: Make) -> None:
    assert extras_of(make()) == []
    config = make(
        store="gs://bucket/store",
        catalogue="postgresql+psycopg://host/name",
        adapter_url_prefixes=("s3://a/", "https://b/c/"),
    )
    assert extras_of(config) == ["gcs", "postgres", "s3"]
    assert ("packages of manyhats[s3]", "ok") in conditions(look_at_extras(config))
