"""The peak memory of a training run, part by part, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyhats.adapters.heads import Pooling
from manyhats.trainer.memory.activations import (
    Step,
    head_bytes,
    inputs_kept,
    layer_backward,
    layer_kept,
    layers_kept,
    of_largest_layer,
)
from manyhats.trainer.memory.adapter_size import AdapterSize
from manyhats.trainer.memory.batch_shape import BatchShape
from manyhats.trainer.memory.shape import BaseShape
from manyhats.trainer.settings.settings import ModelSettings, TrainSettings

_FLOAT = 4
_OPTIMIZER_BYTES: Mapping[str, float] = {
    "adamw": 2 * _FLOAT,
    # Two codes per value, and a float32 scale per 256 codes.
    "adamw_8bit": 2 + 2 * _FLOAT / 256,
    # The same, in memory that CUDA moves to the host when the device is full.
    "paged_adamw_8bit": 0,
}

Parts = Mapping[str, int]
"""What the memory is used for → bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine of a training run.

    Attributes:
        device: ``cpu`` or ``cuda``.
        element_bytes: size of the compute dtype.
        runtime_bytes: memory of the process itself: Python, libraries and tokenizer on a CPU, the context on CUDA.
    """

    device: str
    element_bytes: int
    runtime_bytes: int


@dataclass(frozen=True, slots=True)
class TaskSize:
    """The properties of one task that determine memory use."""

    settings: TrainSettings
    adapter: AdapterSize
    batch: BatchShape

    @property
    def optimizer_bytes(self) -> int:
        """8 bytes per trained parameter, or slightly more than 2 with 8-bit states."""
        return round(_OPTIMIZER_BYTES[self.settings.optimization.optimizer] * self.adapter.num_trained)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPrediction:
    """The predicted peak of training one task or several together.

    Attributes:
        device: whose memory is predicted; for ``cpu`` it is the resident memory of the process.
        phase: when the peak is reached.
        parts: what makes up the peak.
        tasks: what the prediction is based on.
        num_parameters: parameters of the base.
        notes: what had to be assumed.
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
    """The peak of a training run on one base; several tasks take turns, one step at a time.

    It is the sum of what stays in memory (runtime, base, and the data, parameters and optimizer of each task) and the
    largest of the phases that follow each other: the head, the backward pass of a layer, the backward pass from lowered
    values to parameters, and writing a checkpoint.
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
    """Resident memory of the base.

    NF4 linears take 0.516 bytes per parameter, dense ones e. The embedding, and the head unless tied, take e · V · D.
    On a CPU the checkpoint file is mapped into memory: if a matrix is not used as it is stored, its mapped pages
    count in addition to the copy. Norms are float32.
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
    """What each phase needs on top of what stays in memory, by part; P is the number of trained parameters.

    With gradient checkpointing a step keeps each layer's input, 4 · N · D, and what the backward pass of one layer at a
    time reads; without it, what the backward pass of all layers reads. Values computed from the parameters at each step
    are kept with their gradients. Gradients are accumulated at those values, 4 · P, then at the parameters, 4 · P more.
    """
    model, adapter = task.settings.model, task.adapter
    step = of_largest_layer(
        Step(
            shape.architecture,
            adapter,
            task.batch,
            machine.element_bytes,
            is_quantized=model.quantization == "nf4",
            reads=task.settings.head.reads,
        )
    )
    making = {
        "values made of parameters": 2 * _FLOAT * adapter.num_lowered,
        "gradients": _FLOAT * adapter.num_trained,
    }
    reads_one = task.settings.head.kind == "classification"
    if shape.architecture.pooler.pooling is Pooling.MEAN:
        reads_one = False
    inputs = inputs_kept(step, reads_one)
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
    """Parameters and optimizer copied, 12 · P, and serialized into files; what is being serialized counts twice."""
    parameters, optimizer = _FLOAT * task.adapter.num_trained, task.optimizer_bytes
    return {"checkpoint": 2 * (parameters + optimizer) + optimizer}
