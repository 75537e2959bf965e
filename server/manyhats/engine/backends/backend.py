"""The seam between the engine and what computes: everything that a device does stands behind these protocols.

Above them there is no tensor of a device, no kernel, no number of threads; below them no request, job, sequence or
schedule.

Every backend must keep one invariant: a row's result depends on that row and its own keys and values alone, never on
how many rows the step has, on how a prompt was cut into chunks, or on decode against prefill. Without it, preemption,
chunking and prefix hits would change tokens.
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
from manyhats.engine.progress import Progress


class KVCache(Protocol):
    """Keys and values of every layer, in blocks."""

    @property
    def num_blocks(self) -> int:
        """Blocks that sequences can have."""
        ...

    @property
    def block_size(self) -> int:
        """Cells of a block."""
        ...

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        ...

    def write(self, blocks: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Writes the first P cells of a sequence's blocks; keys and values [L, P, Hkv, K], as they are stored."""
        ...


class Packed(Protocol):
    """An adapter's numbers, laid out for a backend, in the host's memory."""

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        ...


PackedT = TypeVar("PackedT", bound=Packed)


class AdapterSlots(Protocol[PackedT]):
    """The adapters that rows can run on, by slot. Slot 0 is the base model and stays empty.

    All of it may be called from any thread, beside a step that does not name the slot.
    """

    def pack(self, adapter: LoweredAdapter) -> PackedT:
        """Lays out an adapter's numbers; slow.

        Raises:
            ModelError: the backend cannot run it.
        """
        ...

    def place(self, slot: int, packed: PackedT) -> None:
        """Puts a packed adapter into an empty slot; the next step may name it."""
        ...

    def clear(self, slot: int) -> None:
        """Empties a slot. No step that names it may be left to run."""
        ...


class Pending(Protocol):
    """What a step is about to give."""

    def result(self) -> Outcome:
        """Waits for it; nothing else of a backend waits."""
        ...


class Logits(Protocol):
    """What a forward has left on its device: logits [M, V], float32. Valid until the next forward."""

    def finish(self, wants: Wants) -> Pending:
        """Launches what makes tokens, log-probabilities and rows of them; never waits."""
        ...


CacheT = TypeVar("CacheT", bound=KVCache, contravariant=True)
SlotsT = TypeVar("SlotsT", bound=AdapterSlots[Any], contravariant=True)


class Model(Protocol[CacheT, SlotsT]):
    """A model's weights on a device, and its forward."""

    @property
    def architecture(self) -> Architecture:
        """What is computed."""
        ...

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """Resident bytes: ``base``, the layers' linears, and ``embeddings``, with head and norms."""
        ...

    def warm_up(self, cache: CacheT, adapters: SlotsT, slot: int, progress: Progress) -> None:
        """Compiles or loads what steps need and runs one, on the thread that will run them; the cache is empty yet.

        Args:
            cache: written to at block 0.
            adapters: of which ``slot`` is empty, and empty again afterwards.
            slot: to try an adapter in.
            progress: told what is compiled.

        Raises:
            ModelError: the logits are not finite.
        """
        ...

    def forward(self, plan: StepPlan, cache: CacheT, adapters: SlotsT) -> Logits:
        """Launches a step, which writes its keys and values; never waits."""
        ...


class Backend(Protocol):
    """One device: how it holds a model, a cache and adapters."""

    @property
    def name(self) -> str:
        """Shown in server info and logs."""
        ...

    def prepare(self, architecture: Architecture, weights: Weights) -> Model[Any, Any]:
        """Lays out the weights.

        Raises:
            ModelError: the backend cannot run this model.
        """
        ...

    def new_cache(self, architecture: Architecture, block_size: int, dtype: str, num_bytes: int) -> KVCache:
        """An empty cache of as many blocks as fit; dtype is ``float32`` or ``bfloat16``.

        Raises:
            ModelError: a block size or head size that the backend cannot run.
        """
        ...

    def new_adapters(self, architecture: Architecture, num_slots: int, dtype: str) -> AdapterSlots[Any]:
        """Empty slots, for adapters kept in ``float32`` or ``bfloat16``."""
        ...

    def start_thread(self) -> None:
        """Prepares the calling thread, which will run the model."""
        ...

    def leave_processors(self, count: int) -> None:
        """Leaves this many of the process's processors to other work from now on; on the thread that was started."""
        ...
