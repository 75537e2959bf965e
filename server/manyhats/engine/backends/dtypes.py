"""The storage dtypes that the engine knows, by name: of matrices, and of keys and values."""

from __future__ import annotations

import torch

from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def torch_dtype(name: str) -> torch.dtype:
    """``float32`` or ``bfloat16`` as torch knows it.

    Raises:
        ModelError: any other name.
    """
    try:
        return _DTYPES[name]
    except KeyError:
        raise ModelError(f"dtype must be one of {', '.join(_DTYPES)}, not {name!r}") from None


def cache_dtype(name: str) -> torch.dtype:
    """``float32``, ``bfloat16`` or ``int8`` as torch knows it.

    Raises:
        ModelError: any other name.
    """
    return torch.int8 if name == "int8" else torch_dtype(name)


def block_bytes(architecture: Architecture, block_size: int, dtype: str) -> int:
    """Keys and values of one block, in all layers."""
    return block_size * architecture.kv_bytes_per_token(dtype)
