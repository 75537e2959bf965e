"""NF4 weights as bitsandbytes keeps them in a checkpoint: six tensors for each matrix.

``{name}`` holds the packed codes; ``{name}.absmax``, ``.quant_map``, ``.nested_absmax`` and
``.nested_quant_map`` the statistics and code tables; ``{name}.quant_state.bitsandbytes__nf4`` a JSON object
as bytes.

Source: bitsandbytes 0.50.2 ``QuantState.as_dict(packed=True)``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, Nf4Weight

_TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE = "quant_state.bitsandbytes__nf4"


def is_nf4(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether the matrix ``name`` is kept in four bits (of whatever kind)."""
    return f"{name}.absmax" in tensors


def nf4_keys(name: str) -> tuple[str, ...]:
    """The keys under which the matrix ``name`` is kept."""
    return (name, *(f"{name}.{part}" for part in (*_TENSORS, _STATE)))


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


def nf4_from_tensors(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Nf4Weight:
    """The matrix ``name`` [out, in] from its six tensors.

    Raises:
        ModelError: another kind of four bits, another block size, no double quantization, or wrong shapes.
    """
    missing = [key for key in nf4_keys(name) if key not in tensors]
    if missing:
        raise ModelError(
            f"{missing[0]} is missing; of 4-bit checkpoints, NF4 with double quantization is supported"
        )
    state = _read_state(name, tensors[f"{name}.{_STATE}"])
    expected = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
        "shape": list(shape),
    }
    for key, value in expected.items():
        if state.get(key) != value:
            raise ModelError(f"{name}: its quantization has {key} {state.get(key)!r}; {value!r} is expected")
    try:
        return Nf4Weight(
            packed=tensors[name].reshape(-1),
            absmax=tensors[f"{name}.absmax"],
            nested_absmax=tensors[f"{name}.nested_absmax"],
            offset=float(state["nested_offset"]),
            code=tensors[f"{name}.quant_map"],
            nested_code=tensors[f"{name}.nested_quant_map"],
            shape=shape,
        )
    except (ModelError, KeyError, TypeError) as error:
        raise ModelError(f"{name}: {error}") from error


def _read_state(name: str, tensor: Tensor) -> Mapping[str, Any]:
    try:
        state = json.loads(bytes(tensor.tolist()))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{name}: its quantization state is not JSON") from error
    if not isinstance(state, dict):
        raise ModelError(f"{name}: its quantization state is not an object")
    return state
