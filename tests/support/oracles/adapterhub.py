"""AdapterHub's bottlenecks as the library computes them, restated step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from manyhats.adapters.sites import BaseDescription, Site
from support.factories.adapterhub import NAME, holder_path


def gate_of(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """The library's gate of whole texts [B, T, D]: [B, 1, n]."""
    return torch.sigmoid(x @ weight.T + bias).mean(dim=1).unsqueeze(1)


class LibraryBlock:
    """One adapter, and how the library runs it inside a layer: before, inside, after the adapter.

    Args:
        config: the method's own.
        tensors: by the library's names.
        site: whose adapter it is.
        base: the model.
        layer_norm: of the stream behind the sub-layer, which the library passes it; None if the layer has none.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        site: Site,
        base: BaseDescription,
        layer_norm: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.base = base
        self.prefix = holder_path(base, site.layer, site.name)
        self.layer_norm = layer_norm
        self.read = torch.empty(0)

    def stream_after(self, m: Tensor, r: Tensor) -> Tensor:
        """The layer's hidden states after the sub-layer, of its output m and of r that entered it."""
        x, residual = self.before(m, r)
        self.read = x
        output = self.inside(x, residual)
        if self.config["is_parallel"]:
            output = output + m
        if self.config["original_ln_after"]:
            output = output + r
            output = output if self.layer_norm is None else self.layer_norm(output)
        return output

    def before(self, m: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        if self.config["is_parallel"]:
            return r, r
        x, residual = m, m
        if self.config["original_ln_before"]:
            x = x + r
            if self.layer_norm is not None:
                residual = x if self.config["residual_before_ln"] == "post_add" else residual
                x = self.layer_norm(x)
        return x, (residual if self.config["residual_before_ln"] else x)

    def inside(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.config["ln_before"]:
            x = self.norm("adapter_norm_before", x)
        hidden = self.project(f"adapter_down.{int(self.config['ln_before'])}", "down", x)
        hidden = import_module("transformers.activations").get_activation(self.config["non_linearity"])(
            hidden
        )
        output = self.project("adapter_up", "up", hidden)
        scaling = self.config["scaling"]
        output = output * (self.tensor("scaling") if isinstance(scaling, str) else scaling)
        if self.config["use_gating"]:
            output = output * gate_of(self.tensor("gate.weight"), self.tensor("gate.bias"), self.read)
        is_sequential = not self.config["is_parallel"]
        if is_sequential and self.config["adapter_residual_before_ln"]:
            output = output + residual
        if self.config["ln_after"]:
            output = self.norm("adapter_norm_after", output)
        if is_sequential and not self.config["adapter_residual_before_ln"]:
            output = output + residual
        return output

    def tensor(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def norm(self, name: str, x: Tensor) -> Tensor:
        norm = nn.LayerNorm(x.shape[-1])
        norm.load_state_dict({part: self.tensor(f"{name}.{part}") for part in ("weight", "bias")})
        normed: Tensor = norm(x)
        return normed

    def project(self, module: str, direction: str, x: Tensor) -> Tensor:
        if not self.config["phm_layer"]:
            return x @ self.tensor(f"{module}.weight").T + self.tensor(f"{module}.bias")
        w = self.factors(module, f"W_{direction}", "W", "shared_W_phm", "factorized_phm_W")
        rule = self.factors(module, "phm_rule", "phm_rule", "shared_phm_rule", "factorized_phm_rule")
        y = sum(x @ torch.kron(rule[i], w[i]) for i in range(self.config["phm_dim"]))
        assert isinstance(y, Tensor)
        return y + self.tensor(f"{module}.b") if self.config["phm_bias"] else y

    def factors(self, module: str, shared: str, own: str, is_shared: str, is_factorized: str) -> Tensor:
        name = f"{self.prefix}{module}.{own}"
        if self.config[is_shared]:
            name = f"{self.base.prefix}shared_parameters.{NAME}.{shared}"
        if self.config[is_factorized]:
            return torch.stack(
                [
                    left @ right
                    for left, right in zip(
                        self.tensors[f"{name}_left"], self.tensors[f"{name}_right"], strict=True
                    )
                ]
            )
        return self.tensors[name]
