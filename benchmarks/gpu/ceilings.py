"""Part 0: what ran, on what, and what the card could do at most."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import Timer

_PACKAGES = ("torch", "triton", "numpy", "bitsandbytes", "transformers", "peft")


def run(out: Recorder, scale: Scale) -> None:
    """Versions, card and ceilings."""
    out.record("versions", python=platform.python_version(), **{name: _version(name) for name in _PACKAGES})
    device = torch.device(scale.device)
    if scale.is_gpu:
        _card(out)
    timer = Timer(device, scale.repeats)
    _copy(out, scale, timer, device)
    _product(out, scale, timer, device)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _card(out: Recorder) -> None:
    card = torch.cuda.get_device_properties(0)
    out.record(
        "card",
        name=card.name,
        sm=10 * card.major + card.minor,
        processors=card.multi_processor_count,
        memory_gb=card.total_memory / 1e9,
        l2_mb=card.L2_cache_size / 1e6,
        cuda=torch.version.cuda,
    )


def _copy(out: Recorder, scale: Scale, timer: Timer, device: torch.device) -> None:
    source = torch.empty(scale.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed = timer.time([lambda: target.copy_(source)])
    out.record("copy", gb=scale.copy_bytes / 1e9, gb_per_s=2 * scale.copy_bytes / timed.seconds / 1e9)


def _product(out: Recorder, scale: Scale, timer: Timer, device: torch.device) -> None:
    """Of random values: of zeros, a card with a limit of power multiplies more."""
    side = scale.product
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in "ab")
    c = torch.empty_like(a)
    timed = timer.time([lambda: torch.mm(a, b, out=c)])
    out.record("product", side=side, tflop_per_s=2 * side**3 / timed.seconds / 1e12)
