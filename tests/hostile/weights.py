"""Weights that are no safetensors file, or one that lies about itself."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from hostile.case import BASE, WEIGHTS, Case, config_of, pack, spoilt, weights_of
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
)
from support.factories.adapters import lora_tensors

Invalid, TooLarge, Unsafe = AdapterInvalidError, AdapterTooLargeError, AdapterUnsafeError
GOOD = save(lora_tensors(BASE, rank=4))
GOOD_LENGTH = int.from_bytes(GOOD[:8], "little")
HEADER: dict[str, Any] = json.loads(GOOD[8 : 8 + GOOD_LENGTH])
DATA = GOOD[8 + GOOD_LENGTH :]
FIRST = min(HEADER, key=lambda name: HEADER[name]["data_offsets"])


def _changed(**fields: Any) -> bytes:
    """A good file, but for fields of its first tensor."""
    header = HEADER | {FIRST: HEADER[FIRST] | fields}
    return pack(json.dumps(header).encode(), DATA)


def _shifted(by: int, name: str = FIRST) -> bytes:
    begin, end = HEADER[name]["data_offsets"]
    header = HEADER | {name: HEADER[name] | {"data_offsets": [begin + by, end + by]}}
    return pack(json.dumps(header).encode(), DATA)


def _torch_archive() -> bytes:
    buffer = io.BytesIO()
    torch.save(lora_tensors(BASE, rank=4), buffer)
    return buffer.getvalue()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(WEIGHTS, GOOD)
    return buffer.getvalue()


class _Evil:
    def __reduce__(self) -> Any:
        return (open, ("/nonexistent/pwned", "w"))


def _many(count: int) -> bytes:
    entries = (f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return pack(("{" + ",".join(entries) + "}").encode())


_SPAN = HEADER[FIRST]["data_offsets"][1] - HEADER[FIRST]["data_offsets"][0]
FILES: dict[str, tuple[bytes, type[Exception]]] = {
    "empty": (b"", Invalid),
    "7 bytes": (GOOD[:7], Invalid),
    "8 bytes": (GOOD[:8], Invalid),
    "truncated header": (GOOD[: GOOD_LENGTH // 2], Invalid),
    "truncated data": (GOOD[:-1], Invalid),
    "a byte too many": (GOOD + b"\0", Invalid),
    "zeros": (bytes(1000), Invalid),
    "ones": (b"\xff" * 1000, Invalid),
    "header longer than the file": (pack(b"{}", length=10**6), Invalid),
    "header of 2**63 bytes": (pack(b"{}", length=2**63), Invalid),
    "header of 2**64 - 1 bytes": (pack(b"{}", length=2**64 - 1), Invalid),
    "header shorter than its JSON": (pack(GOOD[8 : 8 + GOOD_LENGTH], DATA, length=GOOD_LENGTH - 1), Invalid),
    "empty header": (pack(b""), Invalid),
    "no tensors": (pack(b"{}"), Invalid),
    "header a list": (pack(b"[]"), Invalid),
    "header a number": (pack(b"12345678"), Invalid),
    "header not UTF-8": (pack(b'{"\xff": 1}'), Invalid),
    "header with NaN": (pack(b'{"x": NaN}'), Invalid),
    "header with a space first": (pack(b" " + GOOD[8 : 8 + GOOD_LENGTH], DATA), Invalid),
    "header 1000 deep": (pack(b'{"x":' * 1000), TooLarge),
    "a tensor twice": (pack(b'{"x": {}, "x": {}}'), Invalid),
    "a nameless tensor": (pack(b'{"": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), Invalid),
    "a name of 100000 characters": (
        pack(b'{"' + b"x" * 100_000 + b'": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        Invalid,
    ),
    "metadata of numbers": (pack(json.dumps(HEADER | {"__metadata__": {"a": 1}}).encode(), DATA), Invalid),
    "metadata a list": (pack(json.dumps(HEADER | {"__metadata__": []}).encode(), DATA), Invalid),
    "41 tensors": (_many(41), TooLarge),
    "a hundred thousand tensors": (_many(10_000), TooLarge),
    "a pickle": (pickle.dumps(list(range(99))), Unsafe),
    "a pickle that runs code": (pickle.dumps(_Evil()), Unsafe),
    "a pickle of protocol 0": (pickle.dumps({"a": 1}, 0), Invalid),
    "a torch archive": (_torch_archive(), Unsafe),
    "a zip": (_zip(), Unsafe),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), Invalid),
    "GGUF": (b"GGUF" + bytes(100), Invalid),
    "HTML": (b"<!DOCTYPE html><html>404</html>", Invalid),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", Invalid),
}
TENSORS: dict[str, tuple[bytes, type[Exception]]] = {
    "shifted into the next": (_shifted(4), Invalid),
    "shifted before the data": (_shifted(-4), Invalid),
    "negative offsets": (_changed(data_offsets=[-_SPAN, 0]), Invalid),
    "reversed offsets": (_changed(data_offsets=[_SPAN, 0]), Invalid),
    "one offset": (_changed(data_offsets=[0]), Invalid),
    "three offsets": (_changed(data_offsets=[0, _SPAN, _SPAN]), Invalid),
    "float offsets": (_changed(data_offsets=[0.0, float(_SPAN)]), Invalid),
    "offsets of text": (_changed(data_offsets="0,64"), Invalid),
    "offsets past the end": (_changed(data_offsets=[10**9, 10**9 + _SPAN]), Invalid),
    "offsets of 2**64": (_changed(data_offsets=[2**64, 2**64 + _SPAN]), Invalid),
    "wider offsets than its shape": (_changed(data_offsets=[0, _SPAN + 4]), Invalid),
    "no shape": (_changed(shape=None), Invalid),
    "shape of text": (_changed(shape="4,32"), Invalid),
    "negative shape": (_changed(shape=[-4, -32]), Invalid),
    "float shape": (_changed(shape=[4.0, 32.0]), Invalid),
    "bool shape": (_changed(shape=[True, 128]), Invalid),
    "shape of 2**62": (_changed(shape=[2**62, 4]), Invalid),
    "shape whose product wraps to its size": (_changed(shape=[2**32, 2**32 + 1, 4, 32]), Invalid),
    "shape whose product wraps to zero": (_changed(shape=[2**40, 2**24], data_offsets=[0, 0]), Invalid),
    "empty shape with a vast side": (_changed(shape=[0, 2**47, 2**47], data_offsets=[0, 0]), Invalid),
    "100 dimensions": (_changed(shape=[1] * 98 + [4, 32]), Invalid),
    "no dtype": (_changed(dtype=None), Invalid),
    "dtype of numbers": (_changed(dtype=32), Invalid),
    "unknown dtype": (_changed(dtype="F33"), Invalid),
    "lower-case dtype": (_changed(dtype="f32"), Invalid),
    "dtype of another size": (_changed(dtype="F16"), Invalid),
    "one key more": (_changed(strides=[1, 1]), Invalid),
}


def _alone(name: str) -> Callable[[Path], object]:
    """Only a pickle for weights."""

    def replace(source: Path) -> None:
        (source / WEIGHTS).unlink()
        torch.save(lora_tensors(BASE), source / name)

    return replace


def _stranger(source: Path) -> None:
    save_file({"x": torch.zeros(1)}, source / "new_embeddings.safetensors")


def _adapterhub(architecture: str) -> Callable[[Path], object]:
    config = {
        "config": {"r": 4, "architecture": architecture},
        "hidden_size": 32,
        "model_type": "llama",
        "name": "x",
        "version": "adapters.1.3.0",
    }

    def replace(source: Path) -> None:
        config_of(json.dumps(config).encode())(source)
        (source / WEIGHTS).rename(source / "adapter.safetensors")

    return replace


PICKLES = ("adapter_model.bin", "pytorch_adapter.bin")
CASES: list[Case] = [
    *(spoilt(f"weights {name}", weights_of(data), error, "") for name, (data, error) in FILES.items()),
    *(spoilt(f"tensor {name}", weights_of(data), error, "") for name, (data, error) in TENSORS.items()),
    spoilt("tensor of integers", weights_of(_changed(dtype="I32")), AdapterUnsupportedError, FIRST),
    *(
        spoilt(f"weights only {name}", _alone(name), Unsafe, name)
        for name in ("adapter_model.bin", "pytorch_adapter.bin")
    ),
    spoilt("weights of another name", _stranger, AdapterUnsupportedError, "new_embeddings"),
    spoilt("weights of reft", _adapterhub("reft"), AdapterUnsupportedError, "architecture"),
    spoilt("weights of union", _adapterhub("union"), Invalid, "configs"),
]
