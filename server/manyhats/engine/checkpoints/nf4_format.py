"""Four-bit weights as bitsandbytes stores them in a checkpoint: four or six tensors per matrix.

``{name}`` holds the packed codes, as bytes of whatever dtype; ``{name}.absmax`` and ``.quant_map`` the absmaxes and
the table of codes; with double quantization ``.nested_absmax`` and ``.nested_quant_map`` those of the absmaxes;
``{name}.quant_state.bitsandbytes__nf4`` (or ``__fp4``) a JSON object as bytes.

Source: bitsandbytes 0.50.2 ``QuantState.as_dict(packed=True)``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    NF4_CODE,
    Nf4Weight,
    nested_scales,
    unpacked,
)

_CODE_ERROR = 1e-6
"""By which codes may differ from NF4's, which the kernels know."""
_PLAIN = ("absmax", "quant_map")
_NESTED = ("nested_absmax", "nested_quant_map")
_STATE = "quant_state.bitsandbytes__nf4"
_STATES = (_STATE, "quant_state.bitsandbytes__fp4")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def is_quantized(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether the matrix ``name`` is stored in four bits (of any kind)."""
    return f"{name}.absmax" in tensors


def quantized_keys(tensors: Mapping[str, Tensor], name: str) -> tuple[str, ...]:
    """The keys under which the matrix ``name`` is stored."""
    parts = (*_PLAIN, *_NESTED, *_STATES)
    return (name, *(key for part in parts if (key := f"{name}.{part}") in tensors))


def nf4_to_tensors(name: str, weight: Nf4Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The six tensors of one matrix; ``dtype`` is what it was quantized from."""
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
        "nested_offset": weight.offset,
    }
    # The code tables are cloned: a checkpoint may not hold one storage under several names.
    return {
        name: weight.packed.unsqueeze(1),
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": weight.code.clone(),
        f"{name}.nested_absmax": weight.nested_absmax,
        f"{name}.nested_quant_map": weight.nested_code.clone(),
        f"{name}.{_STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


@dataclass(frozen=True, slots=True, eq=False)
class FourBitMatrix:
    """One matrix [out, in] of a checkpoint, in any of bitsandbytes' four-bit forms.

    Attributes:
        name: of the matrix, for errors.
        packed: uint8 [out·in / 2], row major, two codes per byte, high nibble first.
        absmax: [num_blocks], float32; or uint8 codes into ``nested_code``.
        nested_absmax: float32; None if the absmaxes are not quantized.
        nested_code: float32 [256]; likewise.
        offset: of the absmaxes, if they are quantized.
        code: float32 [16].
        quant_type: ``nf4`` or ``fp4``.
        block_size: values per absmax; blocks continue from row to row.
        nested_block_size: absmaxes per nested absmax.
        shape: (out, in).
    """

    name: str
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: float
    code: Tensor
    quant_type: str
    block_size: int
    nested_block_size: int
    shape: tuple[int, int]

    def dequantize(self) -> Tensor:
        """The matrix as float32 [out, in], bit-equal to bitsandbytes' ``dequantize_4bit`` in float32."""
        size = self.shape[0] * self.shape[1]
        values = unpacked(self.packed, self.code)[:size]
        return values.mul_(self._scales().repeat_interleave(self.block_size)[:size]).view(self.shape)

    def nf4(self) -> Nf4Weight:
        """The matrix as the kernels need it: blocks of 64, each within one row.

        Raises:
            ModelError: it is not NF4 or has other codes, has smaller blocks, or rows that are not a multiple of 64.
        """
        if self.quant_type != "nf4":
            raise ModelError(f"{self.name}: is {self.quant_type}; --quantization none serves it, dequantized")
        if self.block_size % BLOCK_SIZE or self.shape[1] % BLOCK_SIZE:
            raise ModelError(
                f"{self.name}: has blocks of {self.block_size} values in rows of {self.shape[1]}; NF4 is served in "
                f"multiples of {BLOCK_SIZE}; --quantization none serves it, dequantized"
            )
        if not torch.allclose(self.code, torch.tensor(NF4_CODE), rtol=0.0, atol=_CODE_ERROR):
            raise ModelError(
                f"{self.name}: its quant_map is not NF4's; --quantization none serves it, dequantized"
            )
        is_usual = (self.block_size, self.nested_block_size) == (BLOCK_SIZE, NESTED_BLOCK_SIZE)
        if is_usual and self.nested_absmax is not None and self.nested_code is not None:
            return self._as(self.absmax, self.nested_absmax, self.nested_code)
        # The same scale for each 64 values of a larger block: exact.
        scales = self._scales().repeat_interleave(self.block_size // BLOCK_SIZE)
        num_blocks = self.shape[0] * self.shape[1] // BLOCK_SIZE
        return self._as(scales[:num_blocks].contiguous(), torch.empty(0), torch.empty(0))

    def _as(self, absmax: Tensor, nested_absmax: Tensor, nested_code: Tensor) -> Nf4Weight:
        return Nf4Weight(
            packed=self.packed,
            absmax=absmax,
            nested_absmax=nested_absmax,
            offset=self.offset,
            code=self.code,
            nested_code=nested_code,
            shape=self.shape,
        )

    def _scales(self) -> Tensor:
        """The absmax of each block, dequantized: float32 [num_blocks]."""
        if self.nested_absmax is None or self.nested_code is None:
            return self.absmax
        return nested_scales(
            self.absmax, self.nested_absmax, self.nested_code, self.offset, self.nested_block_size
        )


def read_quantized(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> FourBitMatrix:
    """The matrix ``name`` [out, in] from its tensors.

    Raises:
        ModelError: a tensor is missing or has the wrong size; names it.
    """
    state_key = next((key for part in _STATES if (key := f"{name}.{part}") in tensors), f"{name}.{_STATE}")
    has_nested = any(f"{name}.{part}" in tensors for part in _NESTED)
    parts = (*_PLAIN, *(_NESTED if has_nested else ()))
    for key in (name, *(f"{name}.{part}" for part in parts), state_key):
        if key not in tensors:
            raise ModelError(
                f"{key} is missing; of 4-bit checkpoints, only those of bitsandbytes are supported"
            )
    state = _read_state(name, tensors[state_key])
    if state.get("shape") not in (None, list(shape)):
        raise ModelError(f"{name}: its quantization has shape {state['shape']}; {list(shape)} is expected")
    quant_type = str(state.get("quant_type"))
    if quant_type not in ("nf4", "fp4"):
        raise ModelError(f"{name}: its quantization has quant_type {quant_type!r}; nf4 and fp4 are supported")
    block_size = _block_size(name, state, "blocksize", BLOCK_SIZE)
    nested_block_size = _block_size(name, state, "nested_blocksize", NESTED_BLOCK_SIZE)
    num_blocks = -(-shape[0] * shape[1] // block_size)
    table = {key: tensors[f"{name}.{key}"] for key in parts}
    _check_size(f"{name}.absmax", table["absmax"], num_blocks)
    _check_size(f"{name}.quant_map", table["quant_map"], 16)
    if has_nested:
        _check_size(f"{name}.nested_absmax", table["nested_absmax"], -(-num_blocks // nested_block_size))
        _check_size(f"{name}.nested_quant_map", table["nested_quant_map"], 256)
    return FourBitMatrix(
        name=name,
        packed=_packed(name, tensors[name], shape),
        absmax=_codes(f"{name}.absmax", table["absmax"])
        if has_nested
        else _floats(f"{name}.absmax", table["absmax"]),
        nested_absmax=_floats(f"{name}.nested_absmax", table["nested_absmax"]) if has_nested else None,
        nested_code=_floats(f"{name}.nested_quant_map", table["nested_quant_map"]) if has_nested else None,
        offset=_offset(name, state) if has_nested else 0.0,
        code=_floats(f"{name}.quant_map", table["quant_map"]),
        quant_type=quant_type,
        block_size=block_size,
        nested_block_size=nested_block_size,
        shape=shape,
    )


def _packed(name: str, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """The codes' bytes, whatever dtype they are stored as (``bnb_4bit_quant_storage``)."""
    packed = tensor.contiguous().view(-1).view(torch.uint8)
    # Wider dtypes round the number of bytes up.
    num_bytes = -(-shape[0] * shape[1] // 2)
    if not num_bytes <= packed.numel() < num_bytes + tensor.element_size():
        raise ModelError(f"{name}: has {packed.numel()} bytes of codes; {list(shape)} needs {num_bytes}")
    return packed[:num_bytes]


def _block_size(name: str, state: Mapping[str, Any], key: str, default: int) -> int:
    size = state.get(key, default)
    if not isinstance(size, int) or isinstance(size, bool) or not 2 <= size <= 2**16 or size & (size - 1):
        raise ModelError(f"{name}: its quantization has {key} {size!r}; a power of two is expected")
    return size


def _offset(name: str, state: Mapping[str, Any]) -> float:
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float):
        raise ModelError(f"{name}: its quantization has nested_offset {offset!r}; a number is expected")
    return float(offset)


def _check_size(key: str, tensor: Tensor, size: int) -> None:
    if tensor.numel() != size:
        raise ModelError(f"{key}: has shape {list(tensor.shape)}; [{size}] is expected")


def _codes(key: str, tensor: Tensor) -> Tensor:
    if tensor.dtype is not torch.uint8:
        raise ModelError(f"{key}: has dtype {tensor.dtype}; with double quantization it is uint8")
    return tensor.reshape(-1)


def _floats(key: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _FLOATS:
        raise ModelError(f"{key}: has dtype {tensor.dtype}; float32, bfloat16 or float16 is expected")
    return tensor.reshape(-1).float()


def _read_state(name: str, tensor: Tensor) -> Mapping[str, Any]:
    try:
        state = json.loads(bytes(tensor.tolist()))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{name}: its quantization state is not JSON") from error
    if not isinstance(state, dict):
        raise ModelError(f"{name}: its quantization state is not an object")
    return state
