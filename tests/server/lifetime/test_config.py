"""Settings: ranges, files, flags over files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.server.access.addresses import is_loopback
from manyhats.server.access.errors import ConfigError
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.config_file import make_config


def make(**settings: Any) -> ServeConfig:
    return make_config({"model": "m", "store": Path("/s"), **settings})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model", ""),
        ("store", ""),
        ("store", "s3:/bucket/x"),
        ("catalogue", "catalogue.db"),
        ("adapter_url_prefixes", ("s3://bucket/tasks",)),
        ("adapter_url_prefixes", ("/adapters/",)),
        ("store_poll_s", 0.0),
        ("store_cache_bytes", 0),
        ("max_virtual_tokens", 0),
        ("max_parts", 0),
        ("max_tasks", 0),
        ("max_versions_per_task", 0),
        ("max_bytes_per_task", 0),
        ("max_bytes", 0),
        ("max_transfers", 0),
        ("device", "tpu"),
        ("dtype", "float16"),
        ("kv_cache_dtype", "int4"),
        ("quantization", "int8"),
        ("log_level", "loud"),
        ("log_format", "xml"),
        ("grpc_port", 70000),
        ("http_port", -1),
        ("http_port", 50051),
        ("host", ""),
        ("max_sequences", 0),
        ("max_batched_tokens", 0),
        ("max_bulk_tokens", 0),
        ("max_score_tokens", 0),
        ("max_context_length", 0),
        ("kv_cache_bytes", 0),
        ("num_threads", -1),
        ("max_task_labels", -1),
        ("drain_limit_s", 0.0),
        ("heartbeat_limit_s", float("nan")),
        ("register", {"../x": "/a"}),
        ("register", {"hats": ""}),
    ],
)
def test_setting_out_of_range_is_named(setting: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**{setting: value})
    assert caught.value.setting == setting


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_host_that_others_can_reach_needs_the_explicit_flag(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        make(host=host)
    assert make(host=host, insecure=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_flag(host: str) -> None:
    assert is_loopback(make(host=host).host)


def test_any_free_port_may_be_asked_for_twice() -> None:
    assert make(grpc_port=0, http_port=0).grpc_port == 0


def test_flags_win_over_the_file_and_dashes_are_underscores(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: from-file\nstore: /data\ngrpc-port: 1234\nadapter-roots: [/a, /b]\n"
        "register: {hats: /a/hats}\n"
    )
    config = make_config({"model": "from-flag", "http_port": None, "adapter_roots": ()}, file)
    assert (config.model, config.store, config.grpc_port) == ("from-flag", "/data", 1234)
    assert (config.http_port, config.adapter_roots) == (8000, (Path("/a"), Path("/b")))
    assert config.register == {"hats": "/a/hats"}


def test_store_may_be_a_directory_or_a_url() -> None:
    for store in ("/data", Path("/data"), "s3://bucket/manyhats", "memory://x"):
        assert make(store=store).store == store
    config = make_config({"store": "s3://b/x", "catalogue": "postgresql+psycopg://db/x", "max_tasks": 5})
    assert (config.store, config.catalogue, config.quotas.max_tasks) == (
        "s3://b/x",
        "postgresql+psycopg://db/x",
        5,
    )
    assert (config.quotas.max_bytes, config.adapter_url_prefixes) == (None, ())


def test_nothing_given_serves_the_default_model_from_the_homes_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MANYHATS_HOME", str(tmp_path))
    config = make_config({})
    assert (config.model, config.store) == ("smollm2-135m-instruct", tmp_path / "store")


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("model: m\nstore: /s\nmodle: x\n", "modle"),
        ("model: m\nstore: /s\ngrpc_port: many\n", "grpc_port"),
        ("model: m\nstore: /s\ngrpc_port: -1\n", "grpc_port"),
        ("model: m\nstore: /s\nhost: 0.0.0.0\n", "host"),
        ("- a\n- b\n", "config"),
        ("a: [\n", "config"),
    ],
)
def test_wrong_file_is_one_error_that_names_the_setting(tmp_path: Path, text: str, setting: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        make_config({}, file)
    assert caught.value.setting == setting


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        make_config({"model": "m", "store": Path("/s")}, tmp_path / "none.yaml")


def test_empty_file_and_no_file_are_the_flags_alone(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("")
    flags = {"model": "m", "store": Path("/s")}
    assert make_config(flags, file) == make_config(flags) == make()


def test_zero_and_false_are_given_values() -> None:
    config = make_config(
        {"model": "m", "store": "/s", "grpc_port": 0, "insecure": False, "max_task_labels": 0}
    )
    assert (config.grpc_port, config.max_task_labels) == (0, 0)


@given(
    st.dictionaries(
        st.text(min_size=1), st.none() | st.integers() | st.text() | st.lists(st.text()), max_size=4
    )
)
def test_no_settings_from_outside_end_in_anything_but_a_config_or_a_config_error(
    settings: dict[str, Any],
) -> None:
    try:
        make_config(settings)
    except ConfigError as error:
        assert error.setting  # noqa: PT017


TLS = {"tls_cert": Path("/c"), "tls_key": Path("/k")}


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, ("--tls-cert and --tls-key", "--token-file")),
        (TLS, ("--token-file",)),
        ({"token_file": Path("/t")}, ("--tls-cert and --tls-key",)),
    ],
)
def test_other_machines_need_encryption_and_tokens(given: dict[str, Any], missing: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        make(host="0.0.0.0", **given)
    assert caught.value.setting == "host"
    assert [
        flags for flags in ("--tls-cert and --tls-key", "--token-file") if flags in str(caught.value)
    ] == (list(missing))
    assert make(host="0.0.0.0", **given, insecure=True).token_file == given.get("token_file")
    assert make(host="0.0.0.0", **TLS, token_file=Path("/t")).tls_files is not None


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({"tls_cert": Path("/c")}, "tls_key"),
        ({"tls_key": Path("/k")}, "tls_cert"),
        ({"tls_client_ca": Path("/ca")}, "tls_client_ca"),
    ],
)
def test_half_of_a_tls_setting_is_named(given: dict[str, Any], setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**given)
    assert caught.value.setting == setting
