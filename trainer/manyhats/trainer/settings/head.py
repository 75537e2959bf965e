"""Settings of a task that reads a text instead of continuing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from manyhats.adapters.heads import TaskKind
from manyhats.settings.declaration import setting
from manyhats.settings.reading import check
from manyhats.trainer.settings.declaring import HEAD, WORDING, require

NONE = "none"
_KINDS: Mapping[str, TaskKind] = MappingProxyType(
    {
        NONE: TaskKind.GENERATE,
        "classification": TaskKind.CLASSIFY,
        "tokens": TaskKind.CLASSIFY_TOKENS,
        "embedding": TaskKind.EMBED,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """What is trained to read texts: a head that tells classes of texts or of tokens, or the vectors of texts.

    The contrastive loss of vectors is that of van den Oord et al. 2018 (arXiv:1807.03748), over a batch.
    """

    kind: Literal["none", "classification", "tokens", "embedding"] = setting(
        NONE, name="head", group=HEAD, help="What reads a text; none continues it."
    )
    pooling: Literal["auto", "first", "last", "mean", "max"] = setting(
        "auto",
        group=HEAD,
        shown="auto, the base's own",
        help="embedding: which hidden values make a text's vector.",
    )
    temperature: float = setting(
        0.05, above=0, group=HEAD, help="embedding: similarities are divided by it in the loss."
    )

    def __post_init__(self) -> None:
        check(self, WORDING)
        if self.kind != "embedding":
            require(self.pooling == "auto", "pooling", "only applies to head embedding")
            require(self.temperature == 0.05, "temperature", "only applies to head embedding")

    @property
    def reads(self) -> bool:
        """Whether texts are read."""
        return self.kind != NONE

    @property
    def task_kind(self) -> TaskKind:
        """What the task does with a text."""
        return _KINDS[self.kind]
