"""Hugging Face checkpoints: a directory of safetensors, its ``config.json``, and the weights made from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manyhats.engine.checkpoints.nf4_format import is_quantized, quantized_keys, read_quantized
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Block
from manyhats.engine.model.layout import Family, Layout, Stored
from manyhats.engine.model.weights import BlockWeights, Linear, Matrix, NormWeight, Weights
from manyhats.engine.progress import Progress

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class SafetensorsDirectory(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, mapped from its files and read when touched.

    Raises:
        ModelError: there are no safetensors files, or one is missing, truncated or malformed.
    """

    def __init__(self, directory: Path) -> None:
        self.files = weight_files(directory)
        self._handles: dict[str, Any] = {}
        for path in self.files:
            if path.name == INDEX_FILE:
                continue
            try:
                handle: Any = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: not a readable safetensors file: {error}") from error
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def __contains__(self, name: object) -> bool:
        return name in self._handles


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        ModelError: it is missing, unreadable, or not an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object")
    return content


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The files that hold a checkpoint's weights: the index and its shards, or the single file.

    Raises:
        ModelError: there are none; pickled checkpoints are refused by name.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(_is_plain_name(name) for name in shards.values()):
            raise ModelError(f"{index}: weight_map must name files of the same directory")
        return (index, *(directory / name for name in sorted(set(shards.values()))))
    if (directory / WEIGHTS_FILE).is_file():
        return (directory / WEIGHTS_FILE,)
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise ModelError(f"{directory / pickles[0]}: pickled weights are refused; save them as safetensors")
    raise ModelError(f"{directory}: has no {WEIGHTS_FILE} and no {INDEX_FILE}")


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")


def check_quantization_config(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` declares bitsandbytes' four-bit weights.

    Raises:
        ModelError: they are quantized in some other way.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return False
    method = quantization.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise ModelError(f"config.json: quantization by {method!r} is not supported; bitsandbytes NF4 is")
    if not (quantization.get("load_in_4bit") or quantization.get("_load_in_4bit")):
        raise ModelError("config.json: of bitsandbytes' quantizations, only the 4-bit ones are supported")
    return True


def expected_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a dense checkpoint must have; [out, in] for linears."""
    architecture, layout = family.architecture, family.layout
    hidden = (architecture.hidden_size,)
    table = (architecture.vocab_size, *hidden)
    shapes: dict[str, tuple[int, ...]] = {
        _weight(layout.embedding): table,
        _weight(layout.final_norm): hidden,
    }
    if not architecture.head.is_tied:
        shapes[_weight(layout.head)] = table
    for layer, block in enumerate(architecture.blocks):
        sizes = {shape.name: shape.size for shape in block.norms()}
        for name, path in layout.norms.items():
            shapes[_weight(layout.path(layer, path))] = (sizes[name],)
        for path, stored in layout.modules.items():
            shape = stored_shape(block, stored)
            shapes[_weight(layout.path(layer, path))] = shape
            if _is_biased(block, stored):
                shapes[_bias(layout.path(layer, path))] = shape[:1]
    return shapes


def stored_shape(block: Block, stored: Stored) -> tuple[int, int]:
    """The shape of a stored matrix, [out of all its linears, in]."""
    members = [linear for linear in block.linears() if linear.name in stored.members]
    return sum(member.d_out for member in members), members[0].d_in


def _is_biased(block: Block, stored: Stored) -> bool:
    return not block.biased.isdisjoint(stored.members)


def _weight(path: str) -> str:
    return f"{path}.weight"


def _bias(path: str) -> str:
    return f"{path}.bias"


def check_tensors(tensors: Mapping[str, Tensor], family: Family) -> None:
    """Refuse a checkpoint that lacks a tensor, has one of another shape, or has one that would go unused.

    Raises:
        ModelError: names the tensor.
    """
    expected = expected_shapes(family)
    known = set(expected)
    for name, shape in expected.items():
        if name not in tensors:
            raise ModelError(f"the checkpoint has no tensor {name}")
        if is_quantized(tensors, name):
            if len(shape) != 2:
                raise ModelError(f"{name}: is quantized but not a matrix")
            known.update(quantized_keys(tensors, name))
            continue
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{name}: has shape {list(tensor.shape)}; the config asks for {list(shape)}")
        if tensor.dtype not in _FLOATS:
            raise ModelError(f"{name}: has dtype {tensor.dtype}; float32, bfloat16 and float16 are supported")
    known |= _check_tied_head(tensors, family)
    unused = sorted(n for n in tensors if n not in known and not n.endswith(family.layout.ignored))
    if unused:
        raise ModelError(f"the checkpoint has {len(unused)} tensors that the model does not use: {unused[0]}")


def _check_tied_head(tensors: Mapping[str, Tensor], family: Family) -> set[str]:
    """Names of a head that repeats the embedding."""
    embedding, head = _weight(family.layout.embedding), _weight(family.layout.head)
    if not family.architecture.head.is_tied or head not in tensors:
        return set()
    if not torch.equal(tensors[head], tensors[embedding]):
        raise ModelError(f"{head}: differs from {embedding}, but the config ties them")
    return {head}


def assemble_weights(
    tensors: Mapping[str, Tensor],
    family: Family,
    *,
    dtype: torch.dtype,
    keep_nf4: bool,
    progress: Progress,
) -> Weights:
    """The model's weights from a checked checkpoint.

    Args:
        tensors: dense, or with matrices in four bits.
        family: what ``check_tensors`` checked them against.
        dtype: float32 or bfloat16, of dense matrices, biases and the embedding; norms are always float32, with the
            family's offset added.
        keep_nf4: NF4 linears in the layers stay NF4; otherwise they are dequantized to ``dtype``, as a quantized
            embedding or head always is. Dense ones (``llm_int8_skip_modules``) stay dense.
        progress: called for each layer.

    Raises:
        ModelError: a linear's NF4 tensors are malformed, or NF4 is to be kept but no linear has it.
    """
    reader = _Reader(tensors, family, dtype, keep_nf4)
    if keep_nf4 and not any(key.endswith(".absmax") for key in tensors):
        raise ModelError("no linear of the checkpoint is NF4, though its config says so")
    architecture, layout = family.architecture, family.layout
    blocks = []
    for index, block in enumerate(architecture.blocks):
        blocks.append(reader.block(index, block))
        progress("load", index + 1, architecture.num_layers)
    is_tied = architecture.head.is_tied
    return Weights(
        embedding=_aligned(reader.table(layout.embedding)),
        blocks=tuple(blocks),
        final_norm=reader.norm(layout.final_norm),
        outer={} if is_tied else {"lm_head": Linear(_aligned(reader.table(layout.head)))},
    )


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that is a multiple of 64, so that no vector load straddles a cache line.

    It matters for the output head, which is read whole at every step; files align tensors to 8 bytes only.
    """
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


class _Reader:
    """Builds blocks from a checkpoint."""

    def __init__(
        self, tensors: Mapping[str, Tensor], family: Family, dtype: torch.dtype, keep_nf4: bool
    ) -> None:
        self._tensors = tensors
        self._architecture = family.architecture
        self._layout: Layout = family.layout
        self._dtype = dtype
        self._keep_nf4 = keep_nf4

    def block(self, index: int, block: Block) -> BlockWeights:
        """Block ``index``."""
        linears: dict[str, Linear] = {}
        for path, stored in self._layout.modules.items():
            linears |= self._members(self._layout.path(index, path), block, stored)
        norms = {
            shape.name: self.norm(self._layout.path(index, self._layout.norms[shape.name]))
            for shape in block.norms()
        }
        return BlockWeights({shape.name: linears[shape.name] for shape in block.linears()}, norms)

    def norm(self, path: str) -> NormWeight:
        """A norm, with the offset its stored weight lacks."""
        return NormWeight(self._tensors[_weight(path)].float() + self._layout.norm_offset)

    def table(self, path: str) -> Tensor:
        """The embedding or the output head, [V, D]."""
        return self._dense(_weight(path), (self._architecture.vocab_size, self._architecture.hidden_size))

    def _members(self, path: str, block: Block, stored: Stored) -> dict[str, Linear]:
        """The linears in one stored matrix, stacked by rows."""
        matrix = self._matrix(_weight(path), stored_shape(block, stored))
        bias = self._tensors[_bias(path)].to(self._dtype) if _is_biased(block, stored) else None
        if len(stored.members) == 1:
            return {stored.members[0]: Linear(matrix, bias)}
        sizes = {linear.name: linear.d_out for linear in block.linears()}
        linears: dict[str, Linear] = {}
        start = 0
        for name in stored.members:
            stop = start + sizes[name]
            part = _rows(_weight(path), matrix, start, stop)
            linears[name] = Linear(part, None if bias is None else bias[start:stop])
            start = stop
        return linears

    def _matrix(self, key: str, shape: tuple[int, int]) -> Matrix:
        if self._keep_nf4 and is_quantized(self._tensors, key):
            return read_quantized(key, self._tensors, shape).nf4()
        return self._dense(key, shape)

    def _dense(self, key: str, shape: tuple[int, int]) -> Tensor:
        if not is_quantized(self._tensors, key):
            return self._tensors[key].to(self._dtype)
        return read_quantized(key, self._tensors, shape).dequantize().to(self._dtype)


def _rows(key: str, weight: Matrix, start: int, stop: int) -> Matrix:
    """Some rows of a stored matrix, as a view."""
    if isinstance(weight, Tensor):
        return weight[start:stop]
    try:
        return weight.rows(start, stop)
    except ModelError as error:
        raise ModelError(f"{key}: {error}; --quantization none serves it") from error
