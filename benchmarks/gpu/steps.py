"""Part E: steps of the engine, of decodes, prompts and both, with and without adapters, on each backend."""

from __future__ import annotations

import gc
import time
from dataclasses import replace

import torch

from benchmarks.gpu.model import RandomModel, adapter_bytes, make_model
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.stepping import BACKENDS, Engine, StepTimes, most_adapters
from manyhats.engine.errors import ModelError

_SHORT_ROWS = (1, 32)
"""Sequences that are left if time is short."""


def run(out: Recorder, scale: Scale) -> None:
    """The engine's own kernels first."""
    if out.is_short and scale.is_gpu:
        out.lacks(f"other numbers of sequences than {_SHORT_ROWS}: the budget is short")
        scale = replace(scale, decode_rows=_SHORT_ROWS, step_prompts=scale.step_prompts[1:2])
    device = torch.device(scale.device)
    model = make_model(scale.shape, device)
    out.record(
        "model",
        step_bytes=model.step_bytes,
        adapter_bytes=adapter_bytes(model.architecture, scale.rank),
        kv_bytes_per_token=model.kv_bytes(1, 1),
        context=scale.step_context,
    )
    out.lacks("steps as graphs: no backend has them")
    for name in BACKENDS:
        if out.is_late:
            return
        _steps_of(out, scale, name, model)
        gc.collect()
        if scale.is_gpu:
            torch.cuda.empty_cache()


def _steps_of(out: Recorder, scale: Scale, name: str, model: RandomModel) -> None:
    engine = _opened(out, scale, name, model)
    if engine is None:
        return
    most = most_adapters(scale, model)
    for rows in scale.decode_rows:
        if not engine.can_hold(rows):
            out.lacks(f"{rows} sequences on {name}: the cache has {engine.cache.num_blocks} blocks")
            continue
        for count in scale.step_adapters:
            if out.is_late:
                return
            if count > min(rows, most):
                continue
            engine.place(count)
            times = engine.decode(rows, scale.step_context, scale.num_steps, count)
            _record(out, "decode", name, times, rows=rows, adapters=count, tokens=rows)
    _loaded(out, scale, name, engine, most)
    for length in scale.step_prompts:
        if out.is_late:
            return
        engine.prefill(length, scale.max_rows)
        times = engine.prefill(length, scale.max_rows)
        seconds = sum(times.step_s)
        out.record("prefill", on=name, length=length, ms=1000 * seconds, tokens_per_s=length / seconds)
    _mixed(out, scale, name, engine)


def _opened(out: Recorder, scale: Scale, name: str, model: RandomModel) -> Engine | None:
    began_s = time.perf_counter()
    try:
        engine = Engine(BACKENDS[name](scale, model), model, scale, most_adapters(scale, model))
    except (ImportError, ModelError) as error:
        out.lacks(f"all of {name}: {error}")
        return None
    figures = {key: value / 1e6 for key, value in engine.model.num_bytes.items()}
    out.record(
        "opened",
        on=name,
        seconds=time.perf_counter() - began_s,
        **{f"{key}_mb": value for key, value in figures.items()},
    )
    return engine


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
    rows, prompt = min(32, max(scale.decode_rows)), scale.step_prompts[0]
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
