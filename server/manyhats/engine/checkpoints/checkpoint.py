"""Hugging Face checkpoints: a directory of safetensors, its ``config.json``, and the weights made of them."""

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
from manyhats.engine.model.families import (
    EMBEDDING_MODULE,
    HEAD_MODULE,
    Architecture,
    layer_path,
    linear_shapes,
)
from manyhats.engine.model.weights import LayerWeights, Linear, Matrix, ModelWeights
from manyhats.engine.progress import Progress

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
EMBEDDING = f"{EMBEDDING_MODULE}.weight"
HEAD = f"{HEAD_MODULE}.weight"
FINAL_NORM = "model.norm.weight"

# Older checkpoints carry the rotary frequencies; they follow from the config.
_HARMLESS_SUFFIX = "rotary_emb.inv_freq"
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
    """Whether a ``config.json`` says that its weights are bitsandbytes' four-bit ones.

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
        raise ModelError("config.json: of bitsandbytes' quantizations only those of 4 bits are supported")
    return True


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a dense checkpoint must have; [out, in] for linears."""
    config = architecture.decoder
    hidden = (config.hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, *hidden), FINAL_NORM: hidden}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, *hidden)
    modules = stored_shapes(architecture)
    norms = _norm_sizes(architecture)
    for layer in range(config.num_layers):
        for path, size in norms.items():
            shapes[f"{layer_path(layer, path)}.weight"] = (size,)
        for path, (out_features, in_features) in modules.items():
            shapes[f"{layer_path(layer, path)}.weight"] = (out_features, in_features)
            if _is_biased(architecture, path):
                shapes[f"{layer_path(layer, path)}.bias"] = (out_features,)
    return shapes


def stored_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Path of each stored matrix below its layer → its shape [out, in], the parts of a fused one together."""
    linears = linear_shapes(architecture.decoder)
    return {
        path: (sum(linears[name][1] for name in parts), linears[parts[0]][0])
        for path, parts in architecture.modules.items()
    }


def _is_biased(architecture: Architecture, path: str) -> bool:
    return not architecture.biased.isdisjoint(architecture.modules[path])


def _norm_sizes(architecture: Architecture) -> dict[str, int]:
    """Path of each norm below its layer → its size."""
    config = architecture.decoder
    heads = (config.num_heads, config.num_kv_heads) if architecture.norms_whole_projection else (1, 1)
    own = {"q_norm": heads[0] * config.head_dim, "k_norm": heads[1] * config.head_dim}
    return {path: own.get(name, config.hidden_size) for name, path in architecture.norms.items()}


def check_tensors(tensors: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Refuse a checkpoint that lacks a tensor, has one of another shape, or has one that would go unused.

    Raises:
        ModelError: naming the tensor.
    """
    expected = expected_shapes(architecture)
    known = set(expected)
    for name, shape in expected.items():
        if name not in tensors:
            raise ModelError(f"the checkpoint has no tensor {name}")
        if is_quantized(tensors, name):
            if len(shape) != 2:
                raise ModelError(f"{name}: is quantized, and no matrix")
            known.update(quantized_keys(tensors, name))
            continue
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{name}: has shape {list(tensor.shape)}; the config asks for {list(shape)}")
        if tensor.dtype not in _FLOATS:
            raise ModelError(f"{name}: has dtype {tensor.dtype}; float32, bfloat16 and float16 are supported")
    if HEAD in tensors and HEAD not in expected:
        if not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
            raise ModelError(f"{HEAD}: differs from {EMBEDDING}, but the config ties them")
        known.add(HEAD)
    unused = sorted(n for n in tensors if n not in known and not n.endswith(_HARMLESS_SUFFIX))
    if unused:
        raise ModelError(f"the checkpoint has {len(unused)} tensors that the model does not use: {unused[0]}")


def assemble_weights(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    keep_nf4: bool,
    progress: Progress,
) -> ModelWeights:
    """The decoder's weights from a checked checkpoint.

    Args:
        tensors: dense, or with matrices in four bits.
        architecture: what ``check_tensors`` checked them against.
        dtype: float32 or bfloat16, of dense matrices, biases and the embedding; norms are float32 always, with
            the family's offset added.
        keep_nf4: NF4 linears of the layers stay so; otherwise they are dequantized to ``dtype``, as a quantized
            embedding or head always is. Dense ones (``llm_int8_skip_modules``) stay dense.
        progress: told of each layer.

    Raises:
        ModelError: a linear's NF4 tensors are not what they should be, or none has them where they are to be kept.
    """
    config = architecture.decoder
    reader = _Reader(tensors, architecture, dtype, keep_nf4)
    if keep_nf4 and not any(key.endswith(".absmax") for key in tensors):
        raise ModelError("no linear of the checkpoint is NF4, though its config says so")
    layers = []
    for index in range(config.num_layers):
        layers.append(reader.layer(index))
        progress("load", index + 1, config.num_layers)
    return ModelWeights(
        embed_tokens=_aligned(reader.dense(EMBEDDING)),
        layers=tuple(layers),
        norm=tensors[FINAL_NORM].float() + architecture.norm_offset,
        lm_head=None if config.tie_word_embeddings else _aligned(reader.dense(HEAD)),
    )


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that is a multiple of 64, so that no vector load straddles a cache line.

    It matters for the output head, which is read whole at every step; files align tensors to 8 bytes only.
    """
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


class _Reader:
    """Layers out of a checkpoint; keeps what is the same for all of them."""

    def __init__(
        self, tensors: Mapping[str, Tensor], architecture: Architecture, dtype: torch.dtype, keep_nf4: bool
    ) -> None:
        self._tensors = tensors
        self._architecture = architecture
        self._linears = linear_shapes(architecture.decoder)
        self._stored = stored_shapes(architecture)
        self._dtype = dtype
        self._keep_nf4 = keep_nf4

    def layer(self, index: int) -> LayerWeights:
        """Layer ``index``."""
        parts_by_name: dict[str, Any] = {}
        for path, parts in self._architecture.modules.items():
            parts_by_name |= self._parts(layer_path(index, path), path, parts)
        offset = self._architecture.norm_offset
        for name, path in self._architecture.norms.items():
            parts_by_name[name] = self._tensors[f"{layer_path(index, path)}.weight"].float() + offset
        return LayerWeights(**parts_by_name)

    def dense(self, key: str) -> Tensor:
        """The embedding or the output head, [V, D]."""
        config = self._architecture.decoder
        return self._dense(key, (config.vocab_size, config.hidden_size))

    def _parts(self, full_path: str, path: str, parts: tuple[str, ...]) -> dict[str, Linear]:
        """The linears that one stored matrix holds, one below the other."""
        weight = self._matrix(f"{full_path}.weight", self._stored[path])
        is_biased = _is_biased(self._architecture, path)
        bias = self._tensors[f"{full_path}.bias"].to(self._dtype) if is_biased else None
        if len(parts) == 1:
            return {parts[0]: Linear(weight, bias)}
        linears: dict[str, Linear] = {}
        start = 0
        for name in parts:
            stop = start + self._linears[name][1]
            part = _rows(f"{full_path}.weight", weight, start, stop)
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
    """Some rows of a stored matrix, in its memory."""
    if isinstance(weight, Tensor):
        return weight[start:stop]
    try:
        return weight.rows(start, stop)
    except ModelError as error:
        raise ModelError(f"{key}: {error}; --quantization none serves it") from error
