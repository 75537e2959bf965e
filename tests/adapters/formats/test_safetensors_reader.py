from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
)
from manyhats.adapters.formats.safetensors_reader import header_size, parse_header, read_tensors
from manyhats.adapters.limits import AdapterLimits

FILE = "adapter_model.safetensors"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def read(data: bytes, limits: AdapterLimits | None = None) -> dict[str, torch.Tensor]:
    limits = limits or AdapterLimits()
    size = header_size(data[:8], len(data), FILE, limits)
    header = parse_header(data[:size], len(data), FILE, limits)
    return read_tensors(header, bytearray(data))


def pack(header: Any, data: bytes = b"", *, padding: str = "") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)) + padding
    return struct.pack("<Q", len(text.encode())) + text.encode() + data


def entry(begin: int = 0, end: int = 16, dtype: str = "F32", shape: Any = (2, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=5,
    )
)
def test_what_the_safetensors_library_writes_is_read_back(
    specs: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    written = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in specs.items()}
    tensors = read(save(written, metadata={"format": "pt"}))
    assert tensors.keys() == written.keys()
    for name, tensor in written.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_padding_and_odd_alignment_are_read() -> None:
    tensors = read(pack({"x": entry()}, struct.pack("<4f", 1, 2, 3, 4), padding="   "))
    assert torch.equal(tensors["x"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_a_header_that_begins_like_a_pickle_is_read() -> None:
    text = json.dumps({"x": entry()})
    data = pack({"x": entry()}, bytes(16), padding=" " * (640 - len(text)))
    assert data.startswith(b"\x80\x02")
    assert read(data)["x"].shape == (2, 2)


ZEROS = bytes(16)
MALFORMED: list[tuple[str, bytes, type[AdapterError]]] = [
    ("empty", b"", AdapterInvalidError),
    ("short", b"\x08\0\0", AdapterInvalidError),
    ("no header", struct.pack("<Q", 10), AdapterInvalidError),
    ("header past the end", struct.pack("<Q", 2**63) + b"{}", AdapterInvalidError),
    ("empty header", struct.pack("<Q", 0), AdapterInvalidError),
    ("not an object", pack("[]"), AdapterInvalidError),
    ("leading space", pack(" {}"), AdapterInvalidError),
    ("not JSON", pack("{nope}"), AdapterInvalidError),
    ("trailing text", pack('{"x": 1} x'), AdapterInvalidError),
    ("no tensors", pack({}), AdapterInvalidError),
    ("no tensors but metadata", pack({"__metadata__": {"a": "b"}}), AdapterInvalidError),
    ("metadata of numbers", pack({"__metadata__": {"a": 1}, "x": entry()}, ZEROS), AdapterInvalidError),
    ("metadata a list", pack({"__metadata__": [], "x": entry()}, ZEROS), AdapterInvalidError),
    (
        "duplicate tensor",
        pack(f'{{"x": {json.dumps(entry())}, "x": {json.dumps(entry())}}}', ZEROS),
        AdapterInvalidError,
    ),
    ("deep", pack('{"x": [[[[[[]]]]]]}'), AdapterTooLargeError),
    ("entry a number", pack({"x": 1}), AdapterInvalidError),
    ("entry without dtype", pack({"x": {"shape": [], "data_offsets": [0, 4]}}, ZEROS), AdapterInvalidError),
    ("entry with more", pack({"x": entry() | {"y": 1}}, ZEROS), AdapterInvalidError),
    ("unknown dtype", pack({"x": entry(dtype="F33")}, ZEROS), AdapterInvalidError),
    ("dtype a list", pack({"x": entry() | {"dtype": ["F32"]}}, ZEROS), AdapterInvalidError),
    ("int dtype", pack({"x": entry(dtype="I32")}, ZEROS), AdapterUnsupportedError),
    ("double dtype", pack({"x": entry(dtype="F64", shape=[2])}, ZEROS), AdapterUnsupportedError),
    ("negative shape", pack({"x": entry(shape=[-2, -2])}, ZEROS), AdapterInvalidError),
    ("fractional shape", pack({"x": entry(shape=[2.0, 2])}, ZEROS), AdapterInvalidError),
    ("boolean shape", pack({"x": entry(0, 4, shape=[True])}, bytes(4)), AdapterInvalidError),
    ("huge shape", pack({"x": entry(shape=[2**60, 2**60])}, ZEROS), AdapterInvalidError),
    ("overflowing shape", pack({"x": entry(shape=[2**32, 2**32])}, ZEROS), AdapterInvalidError),
    ("many dimensions", pack({"x": entry(0, 4, shape=[1] * 9)}, bytes(4)), AdapterInvalidError),
    ("three offsets", pack({"x": entry() | {"data_offsets": [0, 8, 16]}}, ZEROS), AdapterInvalidError),
    ("offsets reversed", pack({"x": entry(16, 0)}, ZEROS), AdapterInvalidError),
    ("negative offset", pack({"x": entry(-16, 0)}, ZEROS), AdapterInvalidError),
    ("size unlike shape", pack({"x": entry(0, 12)}, bytes(12)), AdapterInvalidError),
    ("out of bounds", pack({"x": entry()}, bytes(15)), AdapterInvalidError),
    ("starts late", pack({"x": entry(4, 20)}, bytes(20)), AdapterInvalidError),
    ("bytes left over", pack({"x": entry()}, bytes(17)), AdapterInvalidError),
    ("overlap", pack({"x": entry(0, 16), "y": entry(8, 24)}, bytes(24)), AdapterInvalidError),
    ("same bytes twice", pack({"x": entry(), "y": entry()}, ZEROS), AdapterInvalidError),
    ("hole", pack({"x": entry(0, 16), "y": entry(20, 36)}, bytes(36)), AdapterInvalidError),
    ("nameless tensor", pack({"": entry()}, ZEROS), AdapterInvalidError),
    ("long name", pack({"x" * 600: entry()}, ZEROS), AdapterInvalidError),
]


@pytest.mark.parametrize(
    ("data", "error"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED]
)
def test_malformed_files_are_refused(data: bytes, error: type[AdapterError]) -> None:
    with pytest.raises(error) as caught:
        read(data)
    assert type(caught.value) is error


@pytest.mark.parametrize("shape", [[0, 2**47, 2**47], [2**47, 0, 2**47], [2**24, 2**24, 0]])
def test_empty_tensors_with_vast_sides_are_refused(shape: list[int]) -> None:
    with pytest.raises(AdapterInvalidError, match="larger than any file"):
        read(pack({"x": entry(0, 0, shape=shape)}))
    assert read(pack({"x": entry(0, 0, shape=[0, 2**40])}))["x"].shape == (0, 2**40)


def test_as_many_tensors_as_are_served_fit_in_a_header() -> None:
    limits = AdapterLimits()
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    header = {name.format(i): entry(0, 0, shape=[0] * 8) for i in range(limits.max_num_tensors)}
    assert len(read(pack(header), limits)) == limits.max_num_tensors


def test_limits_hold_on_header_and_tensors() -> None:
    data = save({f"t{i}": torch.zeros(1) for i in range(5)})
    with pytest.raises(AdapterTooLargeError):
        read(data, AdapterLimits(max_num_tensors=4))
    with pytest.raises(AdapterTooLargeError):
        read(data, AdapterLimits(max_header_bytes=100))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_in_disguise_is_unsafe(protocol: int) -> None:
    with pytest.raises(AdapterUnsafeError, match="convert it offline"):
        read(pickle.dumps({"weights": list(range(100))}, protocol))


def test_a_torch_archive_in_disguise_is_unsafe() -> None:
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, buffer)
    assert zipfile.is_zipfile(buffer)
    with pytest.raises(AdapterUnsafeError, match="convert it offline"):
        read(buffer.getvalue())


VALID = save({"a": torch.randn(4, 8), "b": torch.randn(8, 4).half(), "c": torch.randn(3).bfloat16()})


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_corrupted_bytes_raise_nothing_but_adapter_errors(changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
    read_or_refuse(bytes(data))


@given(st.integers(0, len(VALID) - 1))
def test_truncated_files_are_refused(length: int) -> None:
    with pytest.raises(AdapterInvalidError):
        read(VALID[:length])


@given(st.binary(max_size=64), st.integers(0, 200))
def test_inserted_bytes_raise_nothing_but_adapter_errors(extra: bytes, position: int) -> None:
    read_or_refuse(VALID[:position] + extra + VALID[position:])


_NUMBERS = st.integers(-10, 2**64) | st.floats() | st.booleans() | st.none() | st.text(max_size=3)
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "x", 3]),
        "shape": st.lists(st.integers(0, 4) | _NUMBERS, max_size=4),
        "data_offsets": st.lists(st.integers(0, 64) | _NUMBERS, max_size=3),
    }
)


@settings(max_examples=300)
@given(st.dictionaries(st.text(max_size=3), _ENTRIES | _NUMBERS, max_size=3), st.integers(0, 100))
def test_arbitrary_headers_raise_nothing_but_adapter_errors(header: dict[str, Any], num_bytes: int) -> None:
    read_or_refuse(pack(header, bytes(num_bytes)))


def read_or_refuse(data: bytes) -> None:
    """Either the tensors take exactly the file's bytes, or an adapter error is raised."""
    try:
        tensors = read(data)
    except AdapterError:
        return
    header = int.from_bytes(data[:8], "little")
    assert (
        sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == len(data) - 8 - header
    )
