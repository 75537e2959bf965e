"""Sequential bottleneck adapters, trained with plain torch and saved in AdapterHub's layout.

The ``adapters`` library needs another version of transformers than PEFT does here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.packing import PackedBatch
from examples.peft_adapters import BASE_NAME, halved
from examples.settings import BottleneckSettings
from manyhats.adapters.activations import ACTIVATIONS

_LAYOUT = "adapters.1.3.0"


class _Bottleneck(nn.Module):
    """f(x) = U · act(D x + b_d) + b_u; U begins as zeros, so that the adapter begins as nothing."""

    def __init__(self, hidden_size: int, size: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, size)
        self.up = nn.Linear(size, hidden_size)
        self._activate = ACTIVATIONS[activation]
        nn.init.normal_(self.down.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self._activate(self.down(x)))
        return out


class SequentialBottlenecks:
    """``h = r + m + f(r + m)`` after the feed-forward of every layer: r + m is what the layer gives.

    Source: Pfeiffer et al. 2021 (arXiv:2005.00247).
    """

    def __init__(self, model: Any, settings: BottleneckSettings, name: str) -> None:
        self._model = model
        self._settings = settings
        self._name = name
        hidden_size = model.config.hidden_size
        size = hidden_size // settings.reduction_factor
        self._blocks = nn.ModuleList(
            _Bottleneck(hidden_size, size, settings.non_linearity) for _ in model.model.layers
        )
        for layer, block in zip(model.model.layers, self._blocks, strict=True):
            layer.register_forward_hook(lambda module, args, output, block=block: output + block(output))

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return list(self._blocks.parameters())

    def hidden(self, batch: PackedBatch) -> Tensor:
        states: Tensor = self._model.model(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            attention_mask=batch.mask,
            use_cache=False,
        ).last_hidden_state[0]
        return states

    def penalty(self) -> Tensor:
        return torch.zeros(())

    def after_step(self, step: int) -> None:
        pass

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for layer, block in enumerate(self._blocks):
            prefix = f"model.layers.{layer}.output_adapters.adapters.{self._name}."
            for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up")):
                linear = block.get_submodule(ours)
                for part in ("weight", "bias"):
                    tensors[f"{prefix}{theirs}.{part}"] = halved(linear.get_parameter(part).detach())
        save_file(tensors, directory / "adapter.safetensors")
        (directory / "adapter.safetensors").chmod(0o644)
        text = json.dumps(self._config(), indent=2, sort_keys=True)
        (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")

    def _config(self) -> dict[str, object]:
        """What the library writes for ``SeqBnConfig``."""
        inner: dict[str, object] = {
            "adapter_residual_before_ln": False,
            "cross_adapter": False,
            "dropout": 0.0,
            "inv_adapter": None,
            "inv_adapter_reduction_factor": None,
            "is_parallel": False,
            "leave_out": [],
            "ln_after": False,
            "ln_before": False,
            "mh_adapter": False,
            "non_linearity": self._settings.non_linearity,
            "original_ln_after": True,
            "original_ln_before": True,
            "output_adapter": True,
            "phm_layer": False,
            "reduction_factor": self._settings.reduction_factor,
            "residual_before_ln": True,
            "scaling": 1.0,
            "use_gating": False,
        }
        return {
            "config": inner,
            "hidden_size": self._model.config.hidden_size,
            "model_class": type(self._model).__name__,
            "model_name": BASE_NAME,
            "model_type": self._model.config.model_type,
            "name": self._name,
            "version": _LAYOUT,
        }
