"""Part E: steps of the engine, of decodes, prompts and both, with and without adapters, on each backend."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.gpu.model import RandomModel, adapter_bytes, make_model
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.stepping import (
    Engine,
    StepTimes,
    most_adapters,
    open_fast,
    open_launched,
    open_strict,
)
from manyhats.engine.backends.backend import Backend
from manyhats.engine.errors import ModelError
from manyhats.engine.progress import no_progress

_SHORT_ROWS = (1, 32)
"""Sequences that are left if time is short."""


def run(out: Recorder, scale: Scale) -> None:
    """The engine's own kernels first."""
    if out.is_short and scale.is_gpu:
        out.lacks(f"other numbers of sequences than {_SHORT_ROWS}: the budget is short")
        scale = replace(scale, decode_rows=_SHORT_ROWS, step_prompts=scale.step_prompts[1:2])
    model = make_model(scale.shape, torch.device(scale.device))
    out.record(
        "model",
        step_bytes=model.step_bytes,
        adapter_bytes=adapter_bytes(model.architecture, scale.rank),
        kv_bytes_per_token=model.kv_bytes(1, 1),
        context=scale.step_context,
    )
    _steps_of(out, scale, "strict", open_strict, model)
    # Adapters take turns there: one number of them shows what they cost.
    fewer = replace(scale, step_adapters=(0, 8)) if scale.is_gpu else scale
    _steps_of(out, fewer, "fast", open_fast, model)
    if not scale.is_gpu:
        out.lacks("steps with graphs and without: on a CPU there are none")
        return
    few = replace(scale, decode_rows=_SHORT_ROWS, step_adapters=(0, 32), step_prompts=(512,))
    _steps_of(out, few, "strict, launched", open_launched, model)


Opener = Callable[[Scale, RandomModel], Backend]


def _steps_of(out: Recorder, scale: Scale, name: str, opener: Opener, model: RandomModel) -> None:
    """Another backend's memory is given back first."""
    gc.collect()
    if scale.is_gpu:
        torch.cuda.empty_cache()
    with out.going_on(name):
        _measure(out, scale, name, opener, model)


def _measure(out: Recorder, scale: Scale, name: str, opener: Opener, model: RandomModel) -> None:
    most = most_adapters(scale, model)
    engine = None if out.is_late else _opened(out, scale, name, opener, model, most)
    if engine is None:
        return
    for rows in scale.decode_rows:
        if not engine.can_hold(rows):
            out.lacks(f"{rows} sequences on {name}: the cache has {engine.cache.num_blocks} blocks")
            continue
        for count in scale.step_adapters:
            if count <= min(rows, most) and not out.is_late:
                engine.place(count)
                times = engine.decode(rows, scale.step_context, scale.num_steps, count)
                _record(out, "decode", name, times, rows=rows, adapters=count, tokens=rows)
    _loaded(out, scale, name, engine, most)
    for length in scale.step_prompts:
        if not out.is_late:
            _prefill(out, scale, name, engine, length)
    _mixed(out, scale, name, engine)


def _opened(
    out: Recorder, scale: Scale, name: str, opener: Opener, model: RandomModel, most: int
) -> Engine | None:
    """With its memory, and warm."""
    before, began_s = _allocated(scale), time.perf_counter()
    try:
        engine = Engine(opener(scale, model), model, scale, most)
    except (ImportError, ModelError) as error:
        out.lacks(f"all of {name}: {error}")
        return None
    laid_out, laid_out_s = _allocated(scale), time.perf_counter()
    engine.model.warm_up(engine.cache, engine.adapters, 1, no_progress)
    out.record(
        "opened",
        on=name,
        steps_ahead=engine.num_ahead,
        layout_s=laid_out_s - began_s,
        warm_up_s=time.perf_counter() - laid_out_s,
        memory_mb=(laid_out - before) / 1e6,
        warm_up_mb=(_allocated(scale) - laid_out) / 1e6,
        **{f"{key}_mb": value / 1e6 for key, value in engine.model.num_bytes.items()},
    )
    return engine


def _allocated(scale: Scale) -> int:
    """Bytes of the card that are taken, by graphs too."""
    if not scale.is_gpu:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def _prefill(out: Recorder, scale: Scale, name: str, engine: Engine, length: int) -> None:
    for _ in range(scale.num_warm):
        engine.prefill(length, scale.max_rows)
    seconds = sum(engine.prefill(length, scale.max_rows).step_s)
    out.record("prefill", on=name, length=length, ms=1000 * seconds, tokens_per_s=length / seconds)


def _loaded(out: Recorder, scale: Scale, name: str, engine: Engine, most: int) -> None:
    """Rows of the base, with no adapter in memory and with all."""
    rows = min(32, max(scale.decode_rows))
    if not engine.can_hold(rows) or out.is_late:
        return
    for count in (0, min(most, max(scale.step_adapters))):
        engine.place(count)
        times = engine.decode(rows, scale.step_context, scale.num_steps)
        _record(out, "base rows", name, times, rows=rows, loaded=count, tokens=rows)


def _mixed(out: Recorder, scale: Scale, name: str, engine: Engine) -> None:
    rows, prompt = min(32, max(scale.decode_rows)), min(scale.step_prompts[0], engine.longest)
    if out.is_late or not engine.can_hold(rows + 1):
        return
    times = engine.mixed(rows, scale.step_context, prompt, scale.num_steps)
    _record(out, "mixed", name, times, rows=rows, prompt=prompt, tokens=rows + prompt)


def _record(out: Recorder, what: str, name: str, times: StepTimes, *, tokens: int, **figures: int) -> None:
    device_s = sorted(times.device_s)
    out.record(
        what,
        on=name,
        **figures,
        step_ms=1000 * times.median_s,
        largest_ms=1000 * max(times.step_s),
        device_ms=1000 * device_s[len(device_s) // 2] if device_s else None,
        host_share=times.host_share,
        tokens_per_s=tokens / times.median_s,
    )
