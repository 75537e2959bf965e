"""How much memory a training takes at most, part by part, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyhats.trainer.memory.activations import (
    Step,
    head_bytes,
    layer_backward,
    layer_kept,
    layers_kept,
    residual_bytes,
)
from manyhats.trainer.memory.adapter_size import AdapterSize
from manyhats.trainer.memory.batch_shape import BatchShape
from manyhats.trainer.memory.shape import BaseShape
from manyhats.trainer.settings.settings import ModelSettings, TrainSettings

_FLOAT = 4
_OPTIMIZER_BYTES: Mapping[str, float] = {
    "adamw": 2 * _FLOAT,
    # Two codes a value, and a float32 scale per 256 of each.
    "adamw_8bit": 2 + 2 * _FLOAT / 256,
    # The same, in memory that CUDA moves to the host where there is no room for it.
    "paged_adamw_8bit": 0,
}

Parts = Mapping[str, int]
"""Bytes by what they are for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a training runs on.

    Attributes:
        device: ``cpu`` or ``cuda``.
        element_bytes: of the compute dtype.
        runtime_bytes: what the process takes by itself: on a CPU Python, libraries and tokenizer, on CUDA the context.
    """

    device: str
    element_bytes: int
    runtime_bytes: int


@dataclass(frozen=True, slots=True)
class TaskSize:
    """What memory depends on of one task."""

    settings: TrainSettings
    adapter: AdapterSize
    batch: BatchShape

    @property
    def optimizer_bytes(self) -> int:
        """8 bytes a trained parameter, or 2 and a little where its states have 8 bits."""
        return round(_OPTIMIZER_BYTES[self.settings.optimization.optimizer] * self.adapter.num_trained)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPrediction:
    """Of one training, or of several tasks' together.

    Attributes:
        device: whose memory; ``cpu`` is the process's resident memory.
        phase: when the most is needed.
        parts: what it is then made of.
        tasks: what was reckoned with.
        num_parameters: of the base.
        notes: what was supposed.
    """

    device: str
    phase: str
    parts: Parts
    tasks: tuple[TaskSize, ...]
    num_parameters: int
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """The peak, in bytes."""
        return sum(self.parts.values())


def predict(
    tasks: Sequence[TaskSize], shape: BaseShape, machine: Machine, notes: tuple[str, ...] = ()
) -> MemoryPrediction:
    """The peak of a training on one base; of several tasks, a step of one at a time.

    Besides what stays (runtime, base, and each task's data, parameters and optimizer) it is the most of what comes one
    after another: the head, the backward pass of a layer, the gradients' way to the parameters, and a checkpoint.
    """
    staying = {
        "runtime": machine.runtime_bytes,
        **base_bytes(tasks[0].settings.model, shape, machine),
        "data": sum(task.batch.data_bytes for task in tasks) if machine.device == "cpu" else 0,
        "adapter": _FLOAT * sum(task.adapter.num_trained for task in tasks),
        "optimizer": sum(task.optimizer_bytes for task in tasks),
    }
    passing = [(name, parts) for task in tasks for name, parts in passing_bytes(task, shape, machine).items()]
    phase, parts = max(passing, key=lambda named: sum(named[1].values()))
    return MemoryPrediction(
        device=machine.device,
        phase=phase,
        parts={name: size for name, size in {**staying, **parts}.items() if size},
        tasks=tuple(tasks),
        num_parameters=shape.num_parameters,
        notes=notes,
    )


def base_bytes(model: ModelSettings, shape: BaseShape, machine: Machine) -> Parts:
    """What the base keeps resident.

    NF4 linears take 0.516 bytes a parameter, dense ones e. The embedding, and a head of its own, take e · V · D each.
    On a CPU the checkpoint's file is mapped into memory: where a matrix is not used as it is stored, its pages, by the
    stored size of a value, count beside the copy. Norms are float32.
    """
    e = machine.element_bytes
    mapped = shape.stored_bytes if machine.device == "cpu" else 0
    is_quantized = model.quantization == "nf4"
    linears = shape.nf4_bytes if is_quantized else e * shape.num_linear_parameters
    if mapped and not is_quantized and e != shape.stored_bytes:
        linears += shape.nf4_bytes if shape.is_stored_nf4 else mapped * shape.num_linear_parameters
    return {
        "base: linears": linears,
        "base: embedding and head": (e + mapped) * shape.num_table_parameters,
        "base: norms and biases": _FLOAT * shape.num_other_parameters,
    }


def passing_bytes(task: TaskSize, shape: BaseShape, machine: Machine) -> dict[str, Parts]:
    """What is needed besides what stays, by phase and part; P are the trained parameters.

    With gradient checkpointing a step keeps each layer's input, 4 · N · D, and of one layer at a time what its backward
    pass reads; without, of all layers. What parameters are made into at each step, if it is not they themselves, is
    there with its gradient. Gradients are collected at that, 4 · P, and then at the parameters, 4 · P more.
    """
    model, adapter = task.settings.model, task.adapter
    step = Step(shape.architecture, adapter, task.batch, machine.element_bytes, model.quantization == "nf4")
    making = {
        "values made of parameters": 2 * _FLOAT * adapter.num_lowered,
        "gradients": _FLOAT * adapter.num_trained,
    }
    inputs = (shape.architecture.num_layers + 1) * residual_bytes(step)
    if model.gradient_checkpointing:
        kept, of_layer = inputs, layer_kept(step)
    else:
        kept, of_layer = inputs + layers_kept(step), 0
    passing: dict[str, Parts] = {
        "head": {**making, "activations": kept, "head": head_bytes(step)},
        "backward pass": {
            **making,
            "activations": kept + of_layer,
            "backward of a layer": layer_backward(step),
        },
        "gradients": {**making, "gradients": 2 * making["gradients"]},
    }
    return passing if machine.device == "cuda" else {**passing, "checkpoint": _checkpoint(task)}


def _checkpoint(task: TaskSize) -> Parts:
    """Parameters and optimizer copied, 12 · P, and that in the bytes of files; what is made into bytes counts twice."""
    parameters, optimizer = _FLOAT * task.adapter.num_trained, task.optimizer_bytes
    return {"checkpoint": 2 * (parameters + optimizer) + optimizer}
