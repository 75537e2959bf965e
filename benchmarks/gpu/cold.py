"""Part G: an adapter comes into the device's memory while others decode."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from statistics import median

import torch

from benchmarks.gpu.model import adapter_bytes, make_model
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.stepping import Engine, most_adapters, open_strict

_LOADS = 5
_BETWEEN_S = 0.02


def run(out: Recorder, scale: Scale) -> None:
    """The engine's own kernels alone: these have memory for adapters, and a stream for copies."""
    model = make_model(scale.shape, torch.device(scale.device))
    most = most_adapters(scale, model)
    rows = min(scale.num_streams, most - 1)
    scale = replace(scale, decode_rows=(rows,))
    engine = Engine(open_strict(scale, model), model, scale, most)
    engine.place(rows)
    num_steps = 4 * scale.num_steps if scale.is_gpu else scale.num_steps
    alone = engine.decode(rows, scale.step_context, num_steps, rows)
    loader = _Loader(engine, rows + 1, _LOADS if scale.is_gpu else 1)
    beside = engine.decode(
        rows,
        scale.step_context,
        num_steps,
        rows,
        while_steps=lambda step: loader.begin() if not step else None,
    )
    loader.join()
    size = adapter_bytes(model.architecture, scale.rank)
    out.record(
        "cold adapter",
        mb=size / 1e6,
        load_ms=[1000 * each for each in loader.seconds],
        median_ms=1000 * median(loader.seconds),
        gb_per_s=size / median(loader.seconds) / 1e9,
    )
    for name, times in (("alone", alone), ("beside", beside)):
        out.record(
            "steps", rows=rows, way=name, step_ms=1000 * times.median_s, largest_ms=1000 * max(times.step_s)
        )


class _Loader:
    """Places an adapter and clears it again, some times, on a thread of its own."""

    def __init__(self, engine: Engine, slot: int, count: int) -> None:
        self.seconds: list[float] = []
        self._engine, self._slot, self._count = engine, slot, count
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def begin(self) -> None:
        """Once."""
        self._thread.start()

    def join(self) -> None:
        """Wait until it is done; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for _ in range(self._count):
                began_s = time.perf_counter()
                self._engine.adapters.place(self._slot, self._engine.packed)
                self.seconds.append(time.perf_counter() - began_s)
                self._engine.adapters.clear(self._slot)
                time.sleep(_BETWEEN_S)
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self._error = error
