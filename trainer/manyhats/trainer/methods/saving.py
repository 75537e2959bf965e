"""An artifact as the files its library would write: ``adapter_config.json`` and the tensors as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact
from manyhats.adapters.formats.adapterhub.format import is_adapterhub
from manyhats.adapters.formats.peft.format import CONFIG_FILE
from manyhats.adapters.formats.recognition import weights_file
from manyhats.adapters.lowering.lowering import is_finite
from manyhats.trainer.errors import OutputError, SettingError

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"float32": torch.float32, "bfloat16": torch.bfloat16})


def artifact_files(artifact: AdapterArtifact, save_dtype: str) -> dict[str, bytes]:
    """Name → content; the same artifact gives the same bytes.

    Args:
        artifact: its tensors may have gradient history, and be on any device.
        save_dtype: of matrices. Vectors are float32: bfloat16 rounds factors around 1 too coarsely.

    Raises:
        SettingError: ``save_dtype`` is neither ``float32`` nor ``bfloat16``.
        OutputError: a value is not finite; names the tensor.
    """
    if save_dtype not in _DTYPES:
        raise SettingError("save_dtype", f"must be one of {', '.join(_DTYPES)}, not {save_dtype!r}")
    tensors = {name: _stored(name, tensor, _DTYPES[save_dtype]) for name, tensor in artifact.tensors.items()}
    # PEFT's loader requires the name of the tensors' library here; AdapterHub writes nothing.
    metadata = None if is_adapterhub(artifact.config) else {"format": "pt"}
    return {
        CONFIG_FILE: config_bytes(artifact.config),
        weights_file(artifact.config, ()): save(tensors, metadata=metadata),
    }


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The config as JSON, in its own order: the order of PEFT's patterns has a meaning."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _stored(name: str, tensor: Tensor, matrix_dtype: torch.dtype) -> Tensor:
    is_matrix = sum(size > 1 for size in tensor.shape) > 1
    dtype = matrix_dtype if is_matrix else torch.float32
    # A copy: safetensors refuses tensors that share memory.
    stored = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if not is_finite(stored):
        raise OutputError(f"{name} has values that are not finite; the adapter is not written")
    return stored
