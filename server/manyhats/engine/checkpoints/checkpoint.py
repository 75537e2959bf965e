"""Hugging Face checkpoints: a directory of safetensors, its ``config.json``, and the weights made from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manyhats.adapters.sites import ROUTER, Rows
from manyhats.engine.checkpoints.nf4_format import is_quantized, quantized_keys, read_quantized
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Block, Norm, NormShape, linears_by_name
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
            names: list[str] = handle.keys()
            self._handles.update({_modern_name(name): (handle, name) for name in names})

    def __getitem__(self, name: str) -> Tensor:
        handle, own_name = self._handles[name]
        tensor: Tensor = handle.get_tensor(own_name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def __contains__(self, name: object) -> bool:
        return name in self._handles


def _modern_name(name: str) -> str:
    """A tensor's name, of norms in TensorFlow's words too, as files that were converted from it have them."""
    for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


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
    """Name and shape of every tensor a dense checkpoint has; [out, in] for linears unless they are transposed.

    Of an encoder's pooler, which not every checkpoint has, ``Layout.of_files`` knows.
    """
    architecture, layout, shapes = family.architecture, family.layout, _outer_shapes(family)
    for layer, block in enumerate(architecture.blocks):
        norms = {norm.name: norm for norm in block.norms()}
        for name, path in layout.norms.items():
            if name in norms:
                shapes |= _norm_shapes(family.path(layer, path), norms[name].norm, norms[name].shape)
        for path, stored in layout.modules_of(block).items():
            d_out, d_in = stored_shape(block, stored)
            shapes[_weight(family.path(layer, path))] = (
                (d_in, d_out) if stored.is_transposed else (d_out, d_in)
            )
            if _is_biased(block, stored):
                shapes[_bias(family.path(layer, path))] = (d_out,)
    return shapes


def _outer_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """Of what lies outside the layers."""
    architecture, layout = family.architecture, family.layout
    embedding, head, hidden = architecture.embedding, architecture.head, architecture.hidden_size
    inside = embedding.size if embedding.norm is not None else hidden
    shapes: dict[str, tuple[int, ...]] = {
        _weight(layout.outer(layout.embedding)): (embedding.num_tokens, embedding.size)
    }
    if embedding.positions is not None:
        shapes[_weight(layout.outer(layout.positions))] = (embedding.positions.num_rows, inside)
    if embedding.num_token_types:
        shapes[_weight(layout.outer(layout.token_types))] = (embedding.num_token_types, inside)
    if embedding.norm is not None:
        shapes |= _norm_shapes(layout.outer(layout.embedding_norm), embedding.norm, (inside,))
    if embedding.size != hidden:
        shapes[_weight(layout.outer(layout.embedding_projection))] = (hidden, embedding.size)
        if embedding.norm is not None:
            shapes[_bias(layout.outer(layout.embedding_projection))] = (hidden,)
    if architecture.read_size != hidden:
        shapes[_weight(layout.outer(layout.head_projection))] = (architecture.read_size, hidden)
    if architecture.final_norm is not None:
        shapes |= _norm_shapes(layout.outer(layout.final_norm), architecture.final_norm, (hidden,))
    if layout.pooler:
        shapes |= _pooler_shapes(family)
    if head is not None and not head.is_tied:
        shapes[_weight(layout.head)] = (embedding.num_tokens, head.size)
    if head is not None and head.has_bias:
        shapes[_bias(layout.head)] = (embedding.num_tokens,)
    return shapes


def _pooler_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    layout, pooler, size = family.layout, family.architecture.pooler, family.architecture.hidden_size
    shapes = {_weight(layout.pooler_path): (size, size)}
    bias = {_bias(layout.pooler_path): (size,)} if pooler.has_bias else {}
    norm = {} if pooler.norm is None else _norm_shapes(layout.pooler_norm, pooler.norm, (size,))
    return {**shapes, **bias, **norm}


def _norm_shapes(path: str, norm: Norm, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    has = ((_weight(path), norm.has_weight), (_bias(path), norm.has_bias))
    return {name: shape for name, is_there in has if is_there}


def stored_shape(block: Block, stored: Stored) -> tuple[int, int]:
    """The shape of a stored matrix, [out of all its linears, in]."""
    linears = linears_by_name(block)
    members = [linears[name] for name in stored.members]
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
    family = family.of_files(tensors)
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
    layout = family.layout
    unused = sorted(
        name
        for name in tensors
        if name not in known and not name.endswith(layout.ignored) and not name.startswith(layout.unused)
    )
    if unused:
        raise ModelError(f"the checkpoint has {len(unused)} tensors that the model does not use: {unused[0]}")


def _check_tied_head(tensors: Mapping[str, Tensor], family: Family) -> set[str]:
    """Names of a head that repeats the embedding."""
    layout = family.layout
    embedding, head = _weight(layout.outer(layout.embedding)), _weight(layout.head)
    own = family.architecture.head
    if own is None or not own.is_tied or head not in tensors:
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
    family = family.of_files(tensors)
    reader = _Reader(tensors, family, dtype, keep_nf4)
    if keep_nf4 and not any(key.endswith(".absmax") for key in tensors):
        raise ModelError("no linear of the checkpoint is NF4, though its config says so")
    architecture, layout = family.architecture, family.layout
    sets: dict[int, BlockWeights] = {}
    for index, block in enumerate(architecture.blocks):
        if (number := architecture.set_of(index)) not in sets:
            sets[number] = reader.block(index, block)
        progress("load", index + 1, architecture.num_layers)
    embedding = _aligned(reader.dense(_weight(layout.outer(layout.embedding))))
    positions = architecture.embedding.positions
    final_norm = architecture.final_norm
    return Weights(
        embedding=embedding,
        blocks=tuple(sets[architecture.set_of(index)] for index in range(architecture.num_layers)),
        final_norm=None
        if final_norm is None
        else reader.norm(layout.outer(layout.final_norm), final_norm, (architecture.hidden_size,)),
        outer=reader.outer(embedding),
        positions=None if positions is None else reader.dense(_weight(layout.outer(layout.positions))),
        token_types=reader.dense(_weight(layout.outer(layout.token_types)))
        if architecture.embedding.num_token_types
        else None,
        embedding_norm=reader.embedding_norm(),
        pooler_norm=reader.pooler_norm(),
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
        self._family = family
        self._layout: Layout = family.layout
        self._dtype = dtype
        self._keep_nf4 = keep_nf4
        self._shapes = expected_shapes(family)

    def block(self, index: int, block: Block) -> BlockWeights:
        """Block ``index``."""
        linears: dict[str, Linear] = {}
        for path, stored in self._layout.modules_of(block).items():
            linears |= self._members(self._family.path(index, path), block, stored)
        norms = {each.name: self._block_norm(index, block, each) for each in block.norms()}
        return BlockWeights({shape.name: linears[shape.name] for shape in block.linears()}, norms)

    def _block_norm(self, index: int, block: Block, shape: NormShape) -> NormWeight:
        """A norm of a block; of heads whose values have another order in files, in ours."""
        found = self.norm(self._family.path(index, self._layout.norms[shape.name]), shape.norm, shape.shape)
        order = self._family.key_order
        if order is None or shape.name not in ("query", "key"):
            return found
        at = torch.tensor(order)
        return NormWeight(found.weight[..., at], None if found.bias is None else found.bias[..., at])

    def norm(self, path: str, norm: Norm, shape: tuple[int, ...]) -> NormWeight:
        """A norm, with the offset its stored weight lacks."""
        offset = self._layout.norm_offset
        weight = self._tensors[_weight(path)].float() + offset if norm.has_weight else torch.ones(shape)
        return NormWeight(weight, self._tensors[_bias(path)].float() if norm.has_bias else None)

    def embedding_norm(self) -> NormWeight | None:
        """The norm of the embeddings' sum, if there is one."""
        norm = self._family.architecture.embedding.norm
        if norm is None:
            return None
        return self.norm(self._layout.outer(self._layout.embedding_norm), norm, ())

    def pooler_norm(self) -> NormWeight | None:
        """The norm behind the pooler, if there is one."""
        norm = self._family.architecture.pooler.norm
        if norm is None or not self._layout.pooler:
            return None
        return self.norm(self._layout.pooler_norm, norm, ())

    def outer(self, embedding: Tensor) -> dict[str, Linear]:
        """The linears outside the blocks; the head is among them unless it is the embedding alone."""
        architecture, layout = self._family.architecture, self._layout
        head, linears = architecture.head, {}
        if architecture.embedding.size != architecture.hidden_size:
            linears["embedding_projection"] = self._linear(layout.outer(layout.embedding_projection))
        if architecture.read_size != architecture.hidden_size:
            linears["head_projection"] = self._linear(layout.outer(layout.head_projection))
        if layout.pooler:
            linears["pooler"] = self._linear(layout.pooler_path)
        if head is not None and (not head.is_tied or head.has_bias):
            matrix = embedding if head.is_tied else _aligned(self.dense(_weight(layout.head)))
            bias = self._tensors[_bias(layout.head)].to(self._dtype) if head.has_bias else None
            linears["lm_head"] = Linear(matrix, bias)
        return linears

    def _linear(self, path: str) -> Linear:
        """One outside the blocks, with a bias if files have one."""
        bias = self._tensors.get(_bias(path))
        return Linear(self.dense(_weight(path)), None if bias is None else bias.to(self._dtype))

    def dense(self, key: str) -> Tensor:
        """A table or matrix outside the blocks."""
        rows, columns = self._shapes[key]
        return self._dense(key, (rows, columns))

    def _members(self, path: str, block: Block, stored: Stored) -> dict[str, Linear]:
        """The linears in one stored matrix, by their rows."""
        matrix = self._matrix(_weight(path), block, stored)
        bias = self._tensors[_bias(path)].to(self._dtype) if _is_biased(block, stored) else None
        return {
            name: Linear(
                _picked(matrix, rows) if isinstance(matrix, Tensor) else matrix.select(rows),
                None if bias is None else _picked(bias, rows),
            )
            for name, rows in self._family.rows_of(block, stored).items()
        }

    def _matrix(self, key: str, block: Block, stored: Stored) -> Matrix:
        shape = stored_shape(block, stored)  # a quantized matrix always has this one
        if ROUTER in stored.members:
            return self._exact(key, shape)
        if self._keep_nf4 and is_quantized(self._tensors, key):
            return read_quantized(key, self._tensors, shape).nf4()
        if is_quantized(self._tensors, key) or not stored.is_transposed:
            return self._dense(key, shape)
        return self._tensors[key].T.to(self._dtype).contiguous()

    def _exact(self, key: str, shape: tuple[int, int]) -> Tensor:
        """A dense matrix in a dtype that holds each value of the file's."""
        if is_quantized(self._tensors, key):
            return read_quantized(key, self._tensors, shape).dequantize().float()
        matrix = self._tensors[key]
        return matrix if matrix.dtype == torch.bfloat16 else matrix.float()

    def _dense(self, key: str, shape: tuple[int, int]) -> Tensor:
        if not is_quantized(self._tensors, key):
            return self._tensors[key].to(self._dtype)
        return read_quantized(key, self._tensors, shape).dequantize().to(self._dtype)


def _picked(values: Tensor, rows: Rows) -> Tensor:
    return values[rows.start : rows.stop] if isinstance(rows, range) else values[torch.tensor(rows)]
