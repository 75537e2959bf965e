"""An adapter in training, whatever its method: parameters, and how the file's tensors are made from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.formats.adapterhub.format import HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE, is_adapterhub
from manyhats.adapters.formats.peft.format import CONFIG_FILE
from manyhats.adapters.formats.recognition import recorded_base, weights_file
from manyhats.adapters.lowering.lowering import is_finite, lower
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription
from manyhats.trainer.errors import OutputError, SettingError

Reparametrization = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Parameters by name → the file's tensors by name, differentiable."""

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"float32": torch.float32, "bfloat16": torch.bfloat16})


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ParametrizedAdapter:
    """A ``TrainableAdapter`` of any method.

    Attributes:
        config: the ``adapter_config.json``.
        parameters: float32, by the names that checkpoints use.
        base: what it is lowered for.
        reparametrize: makes the file's tensors; None if the parameters are those tensors, by the file's names.
        dropout: of the input of low-rank deltas.
        learning_rate_scales: parameter → its factor, if not 1.
        head_names: parameters that are its task's head, by the names of the file.
        head_config: of a head in files of its own, as AdapterHub has them; None if there is none.
    """

    method: AdapterMethod
    config: Mapping[str, Any]
    parameters: Mapping[str, nn.Parameter]
    base: BaseDescription
    reparametrize: Reparametrization | None = None
    dropout: float = 0.0
    learning_rate_scales: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    head_names: frozenset[str] = frozenset()
    head_config: Mapping[str, Any] | None = None

    def learning_rate_scale(self, name: str) -> float:
        """The factor on one parameter's learning rate."""
        return self.learning_rate_scales.get(name, 1.0)

    def artifact(self) -> AdapterArtifact:
        """The artifact as it stands, with gradient history; its digest is empty, since only files have one."""
        head = {name: value for name, value in self.parameters.items() if name in self.head_names}
        own = {name: value for name, value in self.parameters.items() if name not in self.head_names}
        made = own if self.reparametrize is None else self.reparametrize(own)
        is_apart = self.head_config is not None
        every = {**made, **head}
        return AdapterArtifact(
            digest="",
            method=self.method,
            config=self.config,
            tensors=made if is_apart else every,
            base_model=recorded_base(self.config),
            size_bytes=sum(tensor.numel() * tensor.itemsize for tensor in every.values()),
            num_parameters=sum(tensor.numel() for tensor in every.values()),
            head_config=self.head_config,
            head_tensors=head if is_apart else {},
        )

    def lowered(self) -> LoweredAdapter:
        """``artifact`` as the server's own code lowers it.

        Raises:
            ArtifactError: a value is no longer finite; names the tensor.
        """
        return lower(self.artifact(), self.base)

    def files(self, save_dtype: str) -> Mapping[str, bytes]:
        """The artifact's files by name: matrices in ``save_dtype``, vectors in float32.

        Raises:
            SettingError: ``save_dtype`` is neither ``float32`` nor ``bfloat16``.
            OutputError: a value is not finite; names the tensor.
        """
        return artifact_files(self.artifact(), save_dtype)


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
    # PEFT's loader requires the name of the tensors' library here; AdapterHub writes nothing.
    metadata = None if is_adapterhub(artifact.config) else {"format": "pt"}
    files = {
        CONFIG_FILE: config_bytes(artifact.config),
        weights_file(artifact.config, ()): save(_all_stored(artifact.tensors, save_dtype), metadata=metadata),
    }
    if artifact.head_config is not None:
        files[HEAD_CONFIG_FILE] = config_bytes(artifact.head_config)
        files[HEAD_WEIGHTS_FILE] = save(_all_stored(artifact.head_tensors, save_dtype))
    return files


def _all_stored(tensors: Mapping[str, Tensor], save_dtype: str) -> dict[str, Tensor]:
    return {name: _stored(name, tensor, _DTYPES[save_dtype]) for name, tensor in tensors.items()}


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
