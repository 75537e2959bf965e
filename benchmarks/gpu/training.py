"""Part T: steps of QLoRA with each optimizer, on one batch of random tokens that they learn by heart."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import Any, Literal

import torch

from benchmarks.gpu.model import RandomModel, make_model
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale
from manyhats.engine.checkpoints.loader import GenerationDefaults, LoadedModel
from manyhats.engine.model.describe import describe
from manyhats.trainer.data.batch import TokenizedRow
from manyhats.trainer.errors import SettingError
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.model.decoder import TrainingDecoder
from manyhats.trainer.run.gradients import accumulate_gradients
from manyhats.trainer.run.optimizer import AdapterOptimizer
from manyhats.trainer.settings.methods import LoraSettings
from manyhats.trainer.settings.settings import OptimizationSettings

_Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
_OPTIMIZERS: tuple[_Optimizer, ...] = ("adamw", "adamw_8bit", "paged_adamw_8bit")
_RATE = 1e-3


def run(out: Recorder, scale: Scale) -> None:
    """Each optimizer from the same beginning."""
    device = torch.device(scale.device)
    model = _loaded(make_model(scale.shape, device))
    decoder = TrainingDecoder(model, dtype=torch.bfloat16, gradient_checkpointing=scale.is_gpu, device=device)
    batch = _rows(scale)
    for name in _OPTIMIZERS:
        if out.is_late:
            return
        with out.going_on(name):
            try:
                _train(out, scale, name, model, decoder, batch)
            except SettingError as error:  # 8-bit states need CUDA
                out.lacks(f"steps with {name}: {error}")


def _loaded(random: RandomModel) -> LoadedModel:
    """As if it had been read from files, but that there are no texts."""
    nothing: Any = None
    return LoadedModel(
        architecture=random.architecture,
        weights=random.weights,
        tokenizer=nothing,
        description=describe(random.family, names=("random",), digest=""),
        generation=GenerationDefaults(frozenset()),
        name="random",
        reference="random",
        quantization="nf4",
        usual_quantization="nf4",
        texts=nothing,
    )


def _rows(scale: Scale) -> list[TokenizedRow]:
    """Random tokens; half of each text is learned."""
    count, length = scale.train_rows
    ids = torch.randint(
        0, scale.shape.vocab_size, (count, length), generator=torch.Generator().manual_seed(0)
    )
    is_target = tuple(place >= length // 2 for place in range(length))
    return [TokenizedRow(tuple(row), is_target) for row in ids.tolist()]


def _train(
    out: Recorder,
    scale: Scale,
    name: _Optimizer,
    model: LoadedModel,
    decoder: TrainingDecoder,
    batch: list[TokenizedRow],
) -> None:
    device = torch.device(scale.device)
    settings = OptimizationSettings(optimizer=name, schedule="constant", warmup_steps=0)
    adapter = make_adapter(LoraSettings(rank=scale.rank), "random", model, seed=0, device=device)
    optimizer = AdapterOptimizer(adapter, settings, _RATE)
    losses, seconds = [], []
    for _ in range(scale.train_steps):
        began_s = time.perf_counter()
        losses.append(accumulate_gradients(decoder, adapter, [batch]).loss)
        optimizer.clip()
        optimizer.step(1.0)
        optimizer.clear()
        if scale.is_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began_s)
    out.record(
        "training",
        optimizer=name,
        losses=losses,
        is_finite=all(map(math.isfinite, losses)),
        falls=losses[-1] < losses[0],
        step_ms=1000 * median(seconds),
        tokens_per_s=sum(row.num_tokens for row in batch) / median(seconds),
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if scale.is_gpu else None,
    )
