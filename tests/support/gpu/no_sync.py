"""Finds waits for the device in code that runs on the CPU: what a step must not do between launch and collect.

A dispatch mode alone misses ``tolist``, ``numpy``, ``cpu`` and boolean indexing of tensors on the CPU, so these methods
are refused as well. What makes a tensor of numbers on the host (``torch.from_numpy``) waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING_OPS = frozenset(
    (
        aten._local_scalar_dense.default,
        aten._unique2.default,
        aten.equal.default,
        aten.is_nonzero.default,
        aten.masked_select.default,
        aten.nonzero.default,
        aten.repeat_interleave.Tensor,
        aten.unique_consecutive.default,
    )
)
WAITING_METHODS = ("item", "tolist", "numpy", "cpu", "__array__")


class WaitsForTheDeviceError(RuntimeError):
    """Something would wait."""


class _NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if function is aten.index.Tensor else ()
        if function in WAITING_OPS or any(each is not None and each.dtype == torch.bool for each in indices):
            raise WaitsForTheDeviceError(str(function))
        return function(*args, **(kwargs or {}))


def _refused(name: str) -> Callable[..., None]:
    def method(self: Tensor, *args: object, **kwargs: object) -> None:
        raise WaitsForTheDeviceError(f"Tensor.{name}")

    return method


@contextmanager
def no_sync() -> Iterator[None]:
    """Raises ``WaitsForTheDeviceError`` at whatever would wait for the device."""
    with _methods({name: _refused(name) for name in WAITING_METHODS}), _NoSync():
        yield


@contextmanager
def may_sync() -> Iterator[None]:
    """Lifts ``no_sync``, which must be in force."""
    with torch.utils._python_dispatch._disable_current_modes(), _methods(dict.fromkeys(WAITING_METHODS)):
        yield


@contextmanager
def _methods(methods: dict[str, Any]) -> Iterator[None]:
    """Tensor's own methods replaced; None for those of its base class, written in C."""
    own = {name: Tensor.__dict__.get(name) for name in methods}
    _replace(methods)
    try:
        yield
    finally:
        _replace(own)


def _replace(methods: dict[str, Any]) -> None:
    for name, method in methods.items():
        if method is not None:
            setattr(Tensor, name, method)
        elif name in Tensor.__dict__:
            delattr(Tensor, name)


def guard(monkeypatch: pytest.MonkeyPatch, model: type, logits: type) -> list[str]:
    """Has a model's ``forward`` and its logits' ``finish`` run where nothing may wait; what was launched."""
    launched: list[str] = []
    for owner, name in ((model, "forward"), (logits, "finish")):
        launch = getattr(owner, name)

        def under_guard(*args: Any, launch: Any = launch, name: str = name) -> Any:
            launched.append(name)
            with no_sync():
                return launch(*args)

        monkeypatch.setattr(owner, name, under_guard)
    return launched
