"""AdamW over an adapter's named parameters: scheduled and separate rates, common clipping, state that can be saved."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyhats.trainer.errors import CheckpointError, SettingError
from manyhats.trainer.methods.adapter import TrainableAdapter
from manyhats.trainer.settings.settings import OptimizationSettings

_EPS = 1e-8


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerState:
    """The optimizer's state for each parameter, by ``parameter/entry``: tensors, and plain numbers."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, float]


class AdapterOptimizer:
    """Updates an adapter's parameters, all on one device.

    Args:
        adapter: its ``learning_rate_scale`` gives LoRA+ two rates.
        settings: which AdamW, and its constants.
        learning_rate: the peak, for a scale of 1.

    Raises:
        SettingError: ``optimizer``: the parameters are not on CUDA, which 8-bit states need.

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101); Dettmers et al. 2022 (arXiv:2110.02861).
    """

    def __init__(
        self, adapter: TrainableAdapter, settings: OptimizationSettings, learning_rate: float
    ) -> None:
        self._parameters = dict(adapter.parameters)
        self._max_norm = settings.max_grad_norm
        self._peak = learning_rate
        self._optimizer = _make(settings, _groups(adapter, learning_rate))

    def clear(self) -> None:
        """Clear the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Scale all gradients to a joint norm of at most ``max_grad_norm``; returns the norm before that."""
        parameters = list(self._parameters.values())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._max_norm > 0 and torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm)
        return float(norm)

    def step(self, factor: float) -> None:
        """Update the parameters at ``factor`` times their peak rates."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak * group["scale"] * factor
        self._optimizer.step()

    def state(self) -> OptimizerState:
        """A copy of the state, in host memory."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for name, parameter in self._parameters.items():
            for entry, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{entry}"] = value.detach().to("cpu", copy=True).contiguous()
                else:
                    numbers[f"{name}/{entry}"] = value
        return OptimizerState(tensors, numbers)

    def restore(self, state: OptimizerState) -> None:
        """Restore a saved state.

        Raises:
            CheckpointError: it is for other parameters.
        """
        entries: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in (*state.tensors.items(), *state.numbers.items()):
            name, _, entry = key.rpartition("/")
            entries[name][entry] = value
        if unknown := entries.keys() - self._parameters.keys():
            raise CheckpointError(
                f"the optimizer's state is for another adapter: {', '.join(sorted(unknown))}"
            )
        indices = {id(parameter): index for index, parameter in enumerate(self._ordered())}
        self._optimizer.load_state_dict(
            {
                "state": {indices[id(self._parameters[name])]: value for name, value in entries.items()},
                "param_groups": self._optimizer.state_dict()["param_groups"],
            }
        )

    def _ordered(self) -> list[nn.Parameter]:
        """The parameters in the order in which the optimizer numbers them."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]


def _groups(adapter: TrainableAdapter, learning_rate: float) -> list[dict[str, Any]]:
    """One group per learning rate."""
    by_scale: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in adapter.parameters.items():
        by_scale[adapter.learning_rate_scale(name)].append(parameter)
    return [
        {"params": parameters, "scale": scale, "lr": learning_rate * scale}
        for scale, parameters in sorted(by_scale.items())
    ]


def _make(settings: OptimizationSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    constants: dict[str, Any] = {
        "betas": (settings.beta1, settings.beta2),
        "eps": _EPS,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        # One call for all parameters: an adapter has hundreds of small ones.
        return torch.optim.AdamW(groups, fused=True, **constants)
    device = next(parameter.device for group in groups for parameter in group["params"])
    if device.type != "cuda":
        raise SettingError(
            "optimizer", f"{settings.optimizer} needs a CUDA device; use adamw on {device.type}"
        )
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    kinds = {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}
    optimizer: torch.optim.Optimizer = kinds[settings.optimizer](groups, **constants)
    return optimizer


def num_warmup_steps(settings: OptimizationSettings, num_steps: int) -> int:
    """Warm-up steps: as given, or ``⌈share · all steps⌉`` if ``warmup_steps`` is below 1."""
    warmup = settings.warmup_steps
    return math.ceil(warmup * num_steps) if warmup < 1 else round(warmup)


def learning_rate_factor(settings: OptimizationSettings, step: int, num_steps: int) -> float:
    """The fraction of the peak at ``step``, from 0: ``(step + 1) / warmup`` in the warm-up, then 1 → 0 by schedule.

    With ``p = (step − warmup) / (num_steps − warmup)``: ``1 − p`` (linear), ``(1 + cos πp) / 2`` (cosine), or 1. The
    last warm-up step and the one after it have the peak rate, and no step has a rate of 0.
    """
    warmup = num_warmup_steps(settings, num_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    if settings.schedule == "linear":
        return 1.0 - progress
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
