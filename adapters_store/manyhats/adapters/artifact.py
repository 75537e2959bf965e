"""What an adapter is: a catalogue record, and the artifact its files hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.adapters.reserved_labels import class_names

if TYPE_CHECKING:
    from torch import Tensor


class AdapterMethod(Enum):
    """How an adapter was made, and hence how it acts."""

    LORA = "lora"
    DORA = "dora"
    ADALORA = "adalora"
    VERA = "vera"
    IA3 = "ia3"
    BOTTLENECK = "bottleneck"
    PREFIX_TUNING = "prefix_tuning"
    PROMPT_TUNING = "prompt_tuning"
    P_TUNING = "p_tuning"
    MULTITASK_PROMPT_TUNING = "multitask_prompt_tuning"
    TRAINABLE_TOKENS = "trainable_tokens"
    UNION = "union"
    REFT = "reft"
    COMPOSED = "composed"


class AdapterState(Enum):
    """A version's state."""

    CREATING = "creating"
    ACTIVE = "active"
    INACTIVE = "inactive"
    FAILED = "failed"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class ArtifactPart:
    """One stored artifact of a version.

    Attributes:
        digest: ``sha256:…`` over the artifact's files.
        weight: scales its deltas.
        source: the uri it was registered from.
        text_files: names of its files besides config and tensors, which determine how its task reads and writes text.
    """

    digest: str
    weight: float = 1.0
    source: str = ""
    text_files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """One version of a task's adapter, as the catalogue holds it.

    Attributes:
        task_id: the name callers use.
        version: counts up per task, from 1.
        digest: names what the version does; the same bytes have the same digest. For a plain version it is the
            artifact's, for a composed one that of its parts and their weights (``composed_digest``).
        parts: the artifacts it is made of; a plain version has one, of weight 1.
        size_bytes: of the stored files.
        source: the uri it was registered from.
        base_model: what the artifact names as its base; may be empty.
        registered_for: digest and names of the base that it was registered for; empty if they were not recorded.
        effect: how far it moves the base's logits, as measured at registration; None if not measured.
        notes: what the operator should know about it, such as an unnamed base.
        kind: what its task does with a text.
        num_classes: the outputs of its head; 0 if it has none.
        pooling: what its head reads of a text; None if it has none.
        is_pinned: whether it stays in the memory of servers.
        text: names what its text files mean, as ``TextFacts.fingerprint`` does; empty if they mean what the base's do.
    """

    task_id: str
    version: int
    digest: str
    method: AdapterMethod
    state: AdapterState
    parts: tuple[ArtifactPart, ...]
    size_bytes: int
    num_parameters: int
    source: str
    create_time: datetime
    base_model: str = ""
    registered_for: tuple[str, ...] = ()
    state_reason: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    effect: float | None = None
    notes: tuple[str, ...] = ()
    kind: TaskKind = TaskKind.GENERATE
    num_classes: int = 0
    pooling: Pooling | None = None
    is_pinned: bool = False
    text: str = ""

    @property
    def name(self) -> str:
        """``task@version``."""
        return f"{self.task_id}@{self.version}"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its head's outputs, or else of the answers that its task tells apart; empty for none."""
        return class_names(self.labels, self.num_classes)

    @property
    def is_composed(self) -> bool:
        """Whether its artifacts are combined by ``compose``, rather than a single one served as it is."""
        return self.method is AdapterMethod.COMPOSED


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AdapterArtifact:
    """An artifact in memory: validated config and named tensors, as its files hold them.

    ``head_config`` and ``head_tensors`` are those of a head in files of its own, as AdapterHub saves it.
    """

    digest: str
    method: AdapterMethod
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    base_model: str
    size_bytes: int
    num_parameters: int
    head_config: Mapping[str, Any] | None = None
    head_tensors: Mapping[str, Tensor] = field(default_factory=dict)
