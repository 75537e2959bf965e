"""The seam between the engine and what computes: everything a device does is behind these protocols.

Above them there are no device tensors, kernels or thread counts; below them no requests, jobs, sequences or schedules.

Every backend must keep one invariant: a row's result depends only on that row and its own keys and values, never on how
many rows the step has, how a prompt was split into chunks, or whether it is decode or prefill. Without it, preemption,
chunking and prefix hits would change tokens; plain torch on a GPU keeps it up to rounding only. A gate, which the rows
of an encoder's text share, depends on these alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.backends.wants import Outcome, Wants
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Weights
from manyhats.engine.progress import Progress, no_progress


class KVCache(Protocol):
    """Keys and values of every layer, in blocks."""

    @property
    def num_blocks(self) -> int:
        """The number of blocks available to sequences."""
        ...

    @property
    def block_size(self) -> int:
        """Cells per block."""
        ...

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        ...

    def write(self, blocks: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Write the first P cells of a sequence's blocks; keys and values [L, P, Hkv, K], not yet rounded."""
        ...


class Packed(Protocol):
    """An adapter's matrices, laid out for a backend, in host memory."""

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        ...


PackedT = TypeVar("PackedT", bound=Packed)


class AdapterMemory(Protocol):
    """A device's own memory for adapters: they are copied to it, and it may be full. Callable from any thread."""

    @property
    def num_bytes(self) -> int:
        """In all."""
        ...

    @property
    def num_free_bytes(self) -> int:
        """Which no adapter has; an adapter may need more of them than lie together."""
        ...

    @property
    def num_copied_bytes(self) -> int:
        """Copied to it since the start."""
        ...

    def bytes_of(self, packed: Any) -> int:
        """What a packed adapter takes of it."""
        ...

    def evictions(self, num_bytes: int, idle: Sequence[int]) -> Sequence[int] | None:
        """Which slots to empty so that this many bytes have room; None if emptying all is not enough.

        Args:
            num_bytes: of one adapter.
            idle: slots that may be emptied; no more of the first ones are than it takes.
        """
        ...


class AdapterSlots(Protocol[PackedT]):
    """The adapters that rows can run on, by slot. Slot 0 is the base model and stays empty.

    Every method may be called from any thread, during steps that do not use the slot.
    """

    @property
    def memory(self) -> AdapterMemory | None:
        """The device's memory that ``place`` copies adapters to, beside steps; None if it returns at once."""
        ...

    def pack(self, adapter: LoweredAdapter) -> PackedT:
        """Lay out an adapter's matrices; slow.

        Raises:
            ModelError: the backend cannot run it.
        """
        ...

    def place(self, slot: int, packed: PackedT) -> None:
        """Put a packed adapter into an empty slot; the next step may use it.

        With ``memory``, it waits for a copy: the thread that runs steps does not call it.

        Raises:
            MemoryError: ``memory`` has no room for it.
        """
        ...

    def clear(self, slot: int) -> None:
        """Empty a slot, without waiting. No step that is launched or still to run may use it."""
        ...


class Pending(Protocol):
    """The outcome of a launched step; it outlives the next forward."""

    def result(self) -> Outcome:
        """Wait for the outcome; nothing else in a backend waits. Steps are collected in the order of their launches.

        Whatever it raises, the step runs no more.

        Raises:
            EngineDeadError: the device can run nothing any more; ends the engine.
            Exception: the step failed; ends its jobs.
        """
        ...


class Logits(Protocol):
    """A forward's result on its device: logits [M, V], float32. Valid until the next forward."""

    def finish(self, wants: Wants) -> Pending:
        """Launch the computation of tokens, log-probabilities and rows; never waits."""
        ...


CacheT = TypeVar("CacheT", bound=KVCache, contravariant=True)
SlotsT = TypeVar("SlotsT", bound=AdapterSlots[Any], contravariant=True)


class Model(Protocol[CacheT, SlotsT]):
    """A model's weights on a device, and its forward."""

    @property
    def architecture(self) -> Architecture:
        """The architecture it computes."""
        ...

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """Resident bytes: ``base`` for the layers' linears, ``embeddings`` including head and norms."""
        ...

    def warm_up(self, cache: CacheT, adapters: SlotsT, slot: int, progress: Progress) -> None:
        """Compile or load what steps need and run one, on the thread that will run them; the cache is still empty.

        Args:
            cache: written to at block 0.
            adapters: ``slot`` is empty, and empty again afterwards.
            slot: to try an adapter in.
            progress: called as kernels are compiled.

        Raises:
            ModelError: the logits are not finite.
        """
        ...

    def forward(self, plan: StepPlan, cache: CacheT, adapters: SlotsT) -> Logits:
        """Launch a step, which writes its keys and values; never waits.

        It runs behind the steps launched before it. If this raises, or ``Logits.finish`` does, it runs no more.
        """
        ...


class Backend(Protocol):
    """One device: how it holds a model, a cache and adapters."""

    @property
    def name(self) -> str:
        """Shown in server info and logs."""
        ...

    @property
    def has_own_memory(self) -> bool:
        """Whether it runs on a device with memory of its own."""
        ...

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the one before it is collected.

        Its plan may then name tokens that this one chooses. What is written from the host or placed in slots meanwhile
        is nothing that a step in flight names.
        """
        ...

    def prepare(
        self, architecture: Architecture, weights: Weights, progress: Progress = no_progress
    ) -> Model[Any, Any]:
        """Lay out the weights.

        Args:
            architecture: the model's.
            weights: its matrices and norms.
            progress: called as kernels are compiled, should that take kernels.

        Raises:
            ModelError: the backend cannot run this model.
        """
        ...

    def new_cache(
        self, architecture: Architecture, block_size: int, dtype: str, num_bytes: int | None
    ) -> KVCache:
        """An empty cache of as many blocks as fit; dtype is ``float32``, ``bfloat16`` or ``int8``.

        Args:
            architecture: the model's.
            block_size: cells per block.
            dtype: of keys and values.
            num_bytes: to take; None for what is left of a device's own memory, once the model is prepared.

        Raises:
            ModelError: the backend cannot run this block size or head size, or nothing is left.
        """
        ...

    def new_adapters(self, architecture: Architecture, num_slots: int, dtype: str) -> AdapterSlots[Any]:
        """Empty slots for adapters stored in ``float32`` or ``bfloat16``."""
        ...

    def start_thread(self) -> None:
        """Prepare the calling thread, which will run the model."""
        ...

    def leave_processors(self, count: int) -> None:
        """Leave this many of the process's processors to other work from now on; called on the prepared thread."""
        ...
