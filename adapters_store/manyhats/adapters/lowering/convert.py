"""From a pickle to safetensors, offline; a server never does this.

A pickle can run code when it is read. It is read here with ``torch.load(…, weights_only=True)``, which builds
tensors and plain containers only and refuses everything else.
"""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from manyhats.adapters.disk.links import check_regular
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    ArgumentInvalidError,
    SourceNotFoundError,
    shown,
)
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.json_reader import parse_json_object
from manyhats.adapters.formats.peft import format as peft_format
from manyhats.adapters.limits import AdapterLimits

WARNING = (
    "a pickle can run any code when it is read; torch's restricted loader reads it here, which refuses everything "
    "but tensors; still, only convert pickles from people you trust"
)

# Config format → the pickles that it may come with, and the files they become.
_ADAPTERHUB_PICKLES = (adapterhub_format.PICKLE_FILE,)
_PEFT_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
# What torch's readers raise on bytes that are not theirs.
_MALFORMED = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
    struct.error,
)
# Files read by people, or by whoever serves the task; copied unchanged.
_COPIED = ("README.md", "chat_template.jinja")
_DTYPES: Mapping[torch.dtype, torch.dtype] = MappingProxyType(
    {
        torch.float32: torch.float32,
        torch.float16: torch.float16,
        torch.bfloat16: torch.bfloat16,
        torch.float64: torch.float32,
    }
)


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        source: the pickle.
        target: the safetensors file.
        num_tensors: in the target.
        num_repeated: names of the source that stood for a tensor that has another name in the target.
        size_bytes: of the target.
        notes: what the operator should know.
    """

    source: Path
    target: Path
    num_tensors: int
    num_repeated: int
    size_bytes: int
    notes: tuple[str, ...]


def convert(source: Path, target: Path, limits: AdapterLimits | None = None) -> Conversion:
    """Write the adapter of ``source``, a directory with a pickle, to ``target`` as safetensors.

    The config is copied as it is. So is that of a head which AdapterHub saved beside it, whose pickle is converted too.
    AdapterHub's pickles hold a shared tensor under many names (a prefix under each layer): the shortest name is kept.
    PEFT's keep every name, as PEFT reads each.

    Args:
        source: a directory as PEFT or AdapterHub saves it.
        target: created; it must not exist, or must be empty.
        limits: bounds config and pickle.

    Raises:
        SourceNotFoundError: ``source`` is not a directory.
        ArgumentInvalidError: ``target`` holds something already, or cannot be written.
        AdapterUnsafeError: the restricted loader refuses the pickle.
        ArtifactError: there is nothing to convert, or it is malformed; names the file or tensor.
    """
    limits = limits or AdapterLimits()
    if not source.is_dir():
        raise SourceNotFoundError(str(source), "is not a directory")
    config_bytes = _read(source / peft_format.CONFIG_FILE, limits.max_config_bytes)
    config = parse_json_object(
        config_bytes,
        peft_format.CONFIG_FILE,
        max_bytes=limits.max_config_bytes,
        max_depth=limits.max_config_depth,
    )
    is_adapterhub = adapterhub_format.is_adapterhub(config)
    pickled = _find_pickle(source, is_adapterhub=is_adapterhub)
    loaded, notes = _load(pickled, limits)
    tensors = _name_once(loaded) if is_adapterhub else loaded
    name = adapterhub_format.WEIGHTS_FILE if is_adapterhub else peft_format.WEIGHTS_FILE
    copied = (*_COPIED, adapterhub_format.HEAD_CONFIG_FILE) if is_adapterhub else _COPIED
    copies = {
        copy: _read(source / copy, limits.max_size_bytes) for copy in copied if (source / copy).is_file()
    }
    weights = {name: tensors}
    if adapterhub_format.HEAD_CONFIG_FILE in copies:
        head, head_notes = _load(source / adapterhub_format.HEAD_PICKLE_FILE, limits)
        weights[adapterhub_format.HEAD_WEIGHTS_FILE] = head
        notes += head_notes
    _write(target, weights, {peft_format.CONFIG_FILE: config_bytes, **copies})
    return Conversion(
        source=pickled,
        target=target / name,
        num_tensors=len(tensors),
        num_repeated=len(loaded) - len(tensors),
        size_bytes=(target / name).stat().st_size,
        notes=notes,
    )


def _read(path: Path, max_bytes: int) -> bytes:
    _check_file(path, max_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise AdapterInvalidError(path.name, f"cannot be read: {error.strerror}") from error


def _check_file(path: Path, max_bytes: int) -> None:
    """Refuse a file that is too large, or, after following links, not regular; reading a pipe would wait forever."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise AdapterInvalidError(path.name, "is missing") from None
    except OSError as error:
        raise AdapterInvalidError(path.name, f"cannot be read: {error.strerror}") from error
    check_regular(path.name, status)
    if status.st_size > max_bytes:
        raise AdapterTooLargeError(path.name, f"the limit is {max_bytes} bytes")


def _find_pickle(source: Path, *, is_adapterhub: bool) -> Path:
    names = os.listdir(source)
    if is_adapterhub:
        head = (adapterhub_format.HEAD_CONFIG_FILE, adapterhub_format.HEAD_PICKLE_FILE)
        has_head = all(name in names for name in head)
        adapterhub_format.check_companions([name for name in names if not has_head or name not in head])
    candidates = _ADAPTERHUB_PICKLES if is_adapterhub else _PEFT_PICKLES
    found = [name for name in candidates if name in names]
    if len(found) > 1:
        raise AdapterUnsupportedError(found[1], f"lies next to {found[0]}: which of them is the adapter?")
    if found:
        return source / found[0]
    if any(name.endswith(".safetensors") for name in names):
        raise AdapterInvalidError(source.name, "already holds safetensors; there is nothing to convert")
    raise AdapterInvalidError(candidates[0], "is missing")


def _load(path: Path, limits: AdapterLimits) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The pickle's tensors by name, dense and in a dtype that is served; and notes on what was changed."""
    _check_file(path, limits.max_size_bytes)
    try:
        with warnings.catch_warnings():
            # Torch warns about pickle protocols that it reads only in part; what it cannot read, it refuses.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _begins_as_pickle(path):
            raise AdapterInvalidError(path.name, "is not a pickle that torch can read") from error
        # The rest of the message advises reading it without the restriction.
        lines = str(error).splitlines()
        reason = next((line for line in lines if "GLOBAL" in line or line.startswith("Unsupported")), "")
        what = f": {shown(reason.rstrip('.'))}" if reason else ""
        raise AdapterUnsafeError(path.name, f"the restricted loader refuses it{what}") from error
    except _MALFORMED as error:
        raise AdapterInvalidError(
            path.name, f"is not a pickle that torch can read: {shown(str(error))}"
        ) from error
    if not isinstance(loaded, dict) or not loaded:
        raise AdapterInvalidError(path.name, "is not a table of named tensors")
    if len(loaded) > limits.max_num_tensors:
        raise AdapterTooLargeError(
            path.name, f"has {len(loaded)} tensors; the limit is {limits.max_num_tensors}"
        )
    tensors = {_check_name(name, path.name): _check_tensor(name, value) for name, value in loaded.items()}
    if (
        sum(tensor.numel() * tensor.itemsize for tensor in _name_once(tensors).values())
        > limits.max_size_bytes
    ):
        raise AdapterTooLargeError(
            path.name, f"has tensors of more than {limits.max_size_bytes} bytes in total, the limit"
        )
    doubles = [name for name, tensor in tensors.items() if tensor.dtype is torch.float64]
    notes = (f"{len(doubles)} float64 tensors were converted to float32",) if doubles else ()
    return tensors, notes


def _begins_as_pickle(path: Path) -> bool:
    """Whether it begins as a pickle of protocol 2 or later, or as the archive that torch puts one in."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"\x80", b"PK\x03\x04"))


def _check_name(name: Any, file: str) -> str:
    if not isinstance(name, str):
        raise AdapterInvalidError(file, f"holds {shown(repr(name))}, which is not a tensor's name")
    return name


def _check_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise AdapterInvalidError(name, f"is not a tensor but {shown(type(value).__name__)}")
    if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        raise AdapterUnsupportedError(name, "is not a dense tensor")
    if value.dtype not in _DTYPES:
        raise AdapterUnsupportedError(name, f"has dtype {value.dtype}; adapters are served in floating point")
    return value.detach()


def _name_once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One name per tensor, the shortest if several stand for the same memory."""
    kept: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors, key=lambda name: (len(name), name)):
        tensor = tensors[name]
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        # Empty tensors have no memory to tell them apart by.
        kept.setdefault(identity if tensor.numel() else (name,), name)
    return {name: tensors[name] for name in sorted(kept.values())}


def _write(target: Path, weights: Mapping[str, Mapping[str, Tensor]], files: Mapping[str, bytes]) -> None:
    """Write the directory under a temporary name and move it into place, so that it is complete or absent."""
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ArgumentInvalidError(str(target), "already exists; give a new directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            for file, content in files.items():
                (staged / file).write_bytes(content)
            for name, tensors in weights.items():
                # Clones: safetensors refuses tensors that share memory.
                own = {
                    key: tensor.to(_DTYPES[tensor.dtype]).clone().contiguous()
                    for key, tensor in tensors.items()
                }
                save_file(own, staged / name, metadata={"format": "pt"})
            staged.chmod(0o755)
            staged.replace(target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise ArgumentInvalidError(str(target), f"cannot be written: {error.strerror or error}") from error
