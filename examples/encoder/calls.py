"""The calls of the encoder's example tasks, from ``calls.json``; what serving and asking need, and no more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ADAPTERS = Path(__file__).resolve().parent / "adapters"
BASE_ALIAS = "all-minilm-l6-v2"
_CALLS = Path(__file__).with_name("calls.json")
_METHODS = {"classify": "Classify", "tag": "ClassifyTokens", "embed": "Embed"}
_PATHS = {"classify": "/v1/classify", "embed": "/v1/embeddings"}

Command = Literal["classify", "tag", "embed"]


@dataclass(frozen=True, slots=True)
class EncoderCall:
    """One call.

    Attributes:
        command: of ``manyhats``.
        text: to read.
        classes: of the task's head, in their order; none for a vector.
    """

    command: Command
    text: str
    classes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """Of ``EncodingService``."""
        return _METHODS[self.command]

    @property
    def path(self) -> str | None:
        """Of the HTTP port."""
        return _PATHS.get(self.command)


def read_calls() -> dict[str, EncoderCall]:
    """By task."""
    content: Mapping[str, Mapping[str, object]] = json.loads(_CALLS.read_text(encoding="utf-8"))
    return {
        task: EncoderCall(**{**call, "classes": tuple(call.get("classes", ()))})  # type: ignore[arg-type]
        for task, call in content.items()
    }
