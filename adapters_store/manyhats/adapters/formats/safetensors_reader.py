"""The safetensors format, read strictly: the whole header is checked before any tensor is made.

Layout: 8 bytes little-endian header length N, N bytes of JSON (padded with spaces), then the data. The header maps
each tensor's name to its dtype, shape and ``data_offsets`` (begin and end, counted from the start of the
data). Source: https://github.com/huggingface/safetensors, section Format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.errors import (
    HOW_TO_CONVERT,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    shown,
)
from manyhats.adapters.formats.json_reader import parse_json_object
from manyhats.adapters.limits import AdapterLimits

LENGTH_BYTES = 8

_SERVED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHER_DTYPES = frozenset(
    (
        "F64",
        "I64",
        "I32",
        "I16",
        "I8",
        "U64",
        "U32",
        "U16",
        "U8",
        "BOOL",
        "C64",
        "F8_E4M3",
        "F8_E5M2",
        "F8_E8M0",
        "F8_E4M3FNUZ",
        "F8_E5M2FNUZ",
        "F6_E2M3",
        "F6_E3M2",
        "F4",
    )
)
_KNOWN_DTYPES = _OTHER_DTYPES | _SERVED_DTYPES.keys()
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**48
_MAX_NAME_LENGTH = 512
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What the header says about one tensor; offsets count from the start of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A checked header; the data begins at ``data_start`` bytes into the file."""

    tensors: Mapping[str, TensorSpec]
    data_start: int
    size_bytes: int


def header_size(start: bytes, file_size: int, file: str, limits: AdapterLimits) -> int:
    """Size of length field and header together, in bytes.

    Args:
        start: the file's first 8 bytes.
        file_size: of the whole file.
        file: its name, for errors.
        limits: bounds the header.

    Raises:
        AdapterUnsafeError: it is a pickle or a zip archive (as ``torch.save`` writes).
        AdapterInvalidError: the file is shorter than it claims to be.
        AdapterTooLargeError: the header is over the limit.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    # 80 02 also begins a header of 640 bytes, so these bytes mean a pickle only where no header can follow.
    if start.startswith(_PICKLE_STARTS) and length > min(file_size - LENGTH_BYTES, limits.max_header_bytes):
        raise AdapterUnsafeError(file, f"is a pickle, which can run code when it is read; {HOW_TO_CONVERT}")
    if len(start) < LENGTH_BYTES:
        raise AdapterInvalidError(file, f"is truncated: {file_size} bytes are too few for a safetensors file")
    if length > file_size - LENGTH_BYTES:
        raise AdapterInvalidError(
            file, f"is truncated: the header should have {length} bytes, the file has {file_size}"
        )
    if length > limits.max_header_bytes:
        raise AdapterTooLargeError(
            file, f"its header has {length} bytes; the limit is {limits.max_header_bytes}"
        )
    return LENGTH_BYTES + length


def parse_header(start: bytes, file_size: int, file: str, limits: AdapterLimits) -> SafetensorsHeader:
    """Check the header as a whole: types, shapes and dtypes; offsets in bounds, without overlap or gap.

    Args:
        start: the file's first ``header_size`` bytes (more is allowed).
        file_size: of the whole file.
        file: its name, for errors.
        limits: bounds header and number of tensors.

    Raises:
        AdapterInvalidError: anything contradicts the format; names the file or tensor.
        AdapterUnsupportedError: a dtype that the format knows but no adapter is served in.
        AdapterTooLargeError: over a limit.
        AdapterUnsafeError: it is a pickle or a zip archive.
    """
    data_start = header_size(start, file_size, file, limits)
    text = start[LENGTH_BYTES:data_start]
    if not text.startswith(b"{"):
        raise AdapterInvalidError(file, "is not a safetensors file: its header is not a JSON object")
    entries = parse_json_object(text, file, max_bytes=limits.max_header_bytes, max_depth=4)
    _check_metadata(entries.pop("__metadata__", {}), file)
    if not entries:
        raise AdapterInvalidError(file, "has no tensors")
    if len(entries) > limits.max_num_tensors:
        raise AdapterTooLargeError(
            file, f"holds {len(entries)} tensors; the limit is {limits.max_num_tensors}"
        )
    tensors = {name: _parse_entry(name, entry) for name, entry in entries.items()}
    _check_layout(tensors, file_size - data_start, file)
    return SafetensorsHeader(tensors, data_start, file_size)


def read_tensors(header: SafetensorsHeader, data: bytearray) -> dict[str, Tensor]:
    """The tensors of a file, as views of ``data``, the whole file's bytes; [shape] each, in its stored dtype.

    Raises:
        AdapterInvalidError: ``data`` is not as long as the header was checked for.
    """
    if len(data) != header.size_bytes:
        raise AdapterInvalidError("safetensors", "the file changed while it was read")
    return {name: _view(spec, data, header.data_start) for name, spec in header.tensors.items()}


def _view(spec: TensorSpec, data: bytearray, data_start: int) -> Tensor:
    count = math.prod(spec.shape)
    if count == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    begin = data_start + spec.begin
    flat = torch.frombuffer(data, dtype=spec.dtype, count=count, offset=begin)
    aligned = begin % spec.dtype.itemsize == 0
    return (flat if aligned else flat.clone()).reshape(spec.shape)


def _check_metadata(metadata: Any, file: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterInvalidError(file, "its __metadata__ is not a map of text to text")


def _parse_entry(name: str, entry: Any) -> TensorSpec:
    if not name or len(name) > _MAX_NAME_LENGTH:
        raise AdapterInvalidError(name, f"a tensor's name has 1 to {_MAX_NAME_LENGTH} characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterInvalidError(
            name, "its header entry must have dtype, shape and data_offsets, and nothing else"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise AdapterInvalidError(name, f"its shape must be at most {_MAX_DIMENSIONS} whole numbers")
    # Strides of an empty tensor are computed from its other sides.
    if math.prod(side or 1 for side in shape) >= _MAX_SIZE:
        raise AdapterInvalidError(name, f"its shape {shape} is larger than any file can hold")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise AdapterInvalidError(name, "its data_offsets must be begin and end")
    torch_dtype = _parse_dtype(name, dtype)
    expected = math.prod(shape) * torch_dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise AdapterInvalidError(
            name,
            f"its offsets span {offsets[1] - offsets[0]} bytes; {dtype} of shape {shape} takes {expected}",
        )
    return TensorSpec(name, torch_dtype, tuple(shape), offsets[0], offsets[1])


def _parse_dtype(name: str, dtype: Any) -> torch.dtype:
    if not isinstance(dtype, str) or dtype not in _KNOWN_DTYPES:
        raise AdapterInvalidError(name, f"has the unknown dtype {shown(str(dtype))}")
    if dtype not in _SERVED_DTYPES:
        served = ", ".join(_SERVED_DTYPES)
        raise AdapterUnsupportedError(name, f"has dtype {dtype}; adapters are served from {served}")
    return _SERVED_DTYPES[dtype]


def _is_sizes(value: Any) -> bool:
    # bool is an int to Python, and not to JSON.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _MAX_SIZE for item in value)


def _check_layout(tensors: Mapping[str, TensorSpec], data_bytes: int, file: str) -> None:
    """Check that offsets, in order, meet end to end and cover the data exactly."""
    position = 0
    for spec in sorted(tensors.values(), key=lambda spec: (spec.begin, spec.end)):
        if spec.end > data_bytes:
            raise AdapterInvalidError(
                spec.name, f"ends at byte {spec.end}; {file} has {data_bytes} bytes of data"
            )
        if spec.begin != position:
            fault = "overlaps another tensor" if spec.begin < position else "leaves a gap before it"
            raise AdapterInvalidError(spec.name, f"{fault}: it begins at byte {spec.begin}, not {position}")
        position = spec.end
    if position != data_bytes:
        raise AdapterInvalidError(file, f"has {data_bytes - position} bytes that belong to no tensor")
