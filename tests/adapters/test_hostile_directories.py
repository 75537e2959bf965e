"""What registration refuses because of the directory, the source or the arguments; nothing is published."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapter_factory import lora_tensors, make_base, make_lora
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    ArgumentInvalidError,
    SourceNotAllowedError,
    SourceNotFoundError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.store import AdapterStore
from registrations import assert_refused

BASE = make_base(names=("org/tiny", "tiny"))
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The allowed root and the adapter's directory."""
    return tmp_path / "source"


@pytest.fixture
def store(tmp_path: Path, source: Path) -> AdapterStore:
    source.mkdir()
    return AdapterStore(tmp_path / "store", BASE, [source], AdapterLimits(max_size_bytes=10**6))


def missing_config(source: Path) -> None:
    (source / CONFIG).unlink()


def missing_weights(source: Path) -> None:
    (source / WEIGHTS).unlink()


def nested(source: Path) -> None:
    missing_config(source)
    make_lora(source / "french", BASE)


def pickled(name: str) -> Callable[[Path], None]:
    def replace(source: Path) -> None:
        missing_weights(source)
        torch.save(lora_tensors(BASE), source / name)

    return replace


def disguised_archive(source: Path) -> None:
    torch.save(lora_tensors(BASE), source / WEIGHTS)


def disguised_pickle(source: Path) -> None:
    (source / WEIGHTS).write_bytes(pickle.dumps({"a": list(range(99))}))


def truncated(source: Path) -> None:
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:-1])


def extended(source: Path) -> None:
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes() + b"\0")


def emptied(source: Path) -> None:
    (source / WEIGHTS).write_bytes(b"")


def linked(name: str) -> Callable[[Path], None]:
    def link(source: Path) -> None:
        os.rename(source / name, source.parent / "elsewhere")
        (source / name).symlink_to(source.parent / "elsewhere")

    return link


def piped(name: str) -> Callable[[Path], None]:
    def pipe(source: Path) -> None:
        (source / name).unlink()
        os.mkfifo(source / name)

    return pipe


def made_directory(source: Path) -> None:
    missing_weights(source)
    (source / WEIGHTS).mkdir()


def dangling(source: Path) -> None:
    missing_weights(source)
    (source / WEIGHTS).symlink_to("nothing")


def huge(name: str) -> Callable[[Path], None]:
    def grow(source: Path) -> None:
        with open(source / name, "ab") as file:
            file.truncate(2**40)

    return grow


def config_text(text: bytes) -> Callable[[Path], None]:
    def replace(source: Path) -> None:
        (source / CONFIG).write_bytes(text)

    return replace


def second_weights(source: Path) -> None:
    save_file({"x": torch.zeros(1)}, source / "new_embeddings.safetensors")


def adapterhub(architecture: str | None) -> Callable[[Path], None]:
    def replace(source: Path) -> None:
        inner = {"r": 4} | ({} if architecture is None else {"architecture": architecture})
        config = {
            "config": inner,
            "hidden_size": 32,
            "model_type": "llama",
            "name": "x",
            "version": "adapters.1.3.0",
        }
        (source / CONFIG).write_text(json.dumps(config))
        os.rename(source / WEIGHTS, source / "adapter.safetensors")

    return replace


DIRECTORIES: list[tuple[Callable[[Path], None], type[AdapterError], str]] = [
    (missing_config, AdapterInvalidError, CONFIG),
    (missing_weights, AdapterInvalidError, WEIGHTS),
    (nested, AdapterInvalidError, CONFIG),
    (pickled("adapter_model.bin"), AdapterUnsafeError, "adapter_model.bin"),
    (pickled("pytorch_adapter.bin"), AdapterUnsafeError, "pytorch_adapter.bin"),
    (disguised_archive, AdapterUnsafeError, WEIGHTS),
    (disguised_pickle, AdapterUnsafeError, WEIGHTS),
    (truncated, AdapterInvalidError, ""),
    (extended, AdapterInvalidError, WEIGHTS),
    (emptied, AdapterInvalidError, WEIGHTS),
    (linked(CONFIG), AdapterUnsafeError, CONFIG),
    (linked(WEIGHTS), AdapterUnsafeError, WEIGHTS),
    (dangling, AdapterUnsafeError, WEIGHTS),
    (piped(CONFIG), AdapterUnsafeError, CONFIG),
    (piped(WEIGHTS), AdapterUnsafeError, WEIGHTS),
    (made_directory, AdapterUnsafeError, WEIGHTS),
    (huge(CONFIG), AdapterTooLargeError, CONFIG),
    (huge(WEIGHTS), AdapterTooLargeError, WEIGHTS),
    (second_weights, AdapterUnsupportedError, "new_embeddings.safetensors"),
    (adapterhub("reft"), AdapterUnsupportedError, "architecture"),
    (adapterhub("union"), AdapterUnsupportedError, "architecture"),
    (config_text(b""), AdapterInvalidError, CONFIG),
    (config_text(b"[]"), AdapterInvalidError, CONFIG),
    (config_text(b'{"peft_type": "LORA", "peft_type": "LORA"}'), AdapterInvalidError, CONFIG),
    (config_text(b'{"peft_type": "LORA", "r": NaN}'), AdapterInvalidError, CONFIG),
    (config_text(b'{"a": ' * 100), AdapterTooLargeError, CONFIG),
    (config_text(b"\x80\x04" + bytes(30)), AdapterInvalidError, CONFIG),
]


@pytest.mark.parametrize(("spoil", "error", "subject"), DIRECTORIES)
def test_spoilt_directories_are_refused(
    store: AdapterStore, source: Path, spoil: Callable[[Path], None], error: type[AdapterError], subject: str
) -> None:
    make_lora(source, BASE, rank=4)
    spoil(source)
    assert_refused(store, source, error, subject)


def test_adapters_over_the_size_limit_are_refused_together(tmp_path: Path, source: Path) -> None:
    make_lora(source, BASE)
    total = sum(file.stat().st_size for file in source.iterdir())
    store = AdapterStore(tmp_path / "store", BASE, [source], AdapterLimits(max_size_bytes=total - 1))
    assert_refused(store, source, AdapterTooLargeError, WEIGHTS)
    store = AdapterStore(tmp_path / "store", BASE, [source], AdapterLimits(max_size_bytes=total))
    assert store.register("task", str(source)).record.size_bytes == total


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("", SourceNotFoundError),
        ("nothing", SourceNotFoundError),
        ("..", SourceNotAllowedError),
        ("/", SourceNotAllowedError),
        ("/etc", SourceNotAllowedError),
        ("s3://bucket/key", SourceNotAllowedError),
        ("http://169.254.169.254/latest", SourceNotAllowedError),
        ("file:///etc", SourceNotAllowedError),
    ],
)
def test_sources_that_are_not_there_or_not_allowed_are_refused(
    store: AdapterStore, source: Path, uri: str, error: type[AdapterError]
) -> None:
    assert_refused(store, source, error, "uri" if uri == "" else uri, uri=uri)


@pytest.mark.parametrize(
    "arguments",
    [
        {"labels": {"": "x"}},
        {"labels": {"a": "x" * 300}},
        {"labels": {"a\n": "x"}},
        {"labels": {str(n): "x" for n in range(65)}},
        {"request_id": "x" * 200},
        {"request_id": "a\0"},
    ],
)
def test_arguments_out_of_range_are_refused(
    store: AdapterStore, source: Path, arguments: dict[str, Any]
) -> None:
    make_lora(source, BASE)
    with pytest.raises(ArgumentInvalidError) as caught:
        store.register("task", str(source), **arguments)
    assert caught.value.subject in arguments


@pytest.mark.parametrize("task_id", ["", "../x", "Task", "a@1", "a,b", "a/b", "x" * 64])
def test_task_ids_that_are_none_are_refused(store: AdapterStore, source: Path, task_id: str) -> None:
    make_lora(source, BASE)
    with pytest.raises(ArgumentInvalidError):
        store.register(task_id, str(source))
    assert store.list().records == ()
