"""How much memory a training will take, predicted from shapes."""

from __future__ import annotations

from manyhats.trainer.memory.dry_run import NO_DATA, predict_memory
from manyhats.trainer.memory.prediction import MemoryPrediction

__all__ = ["NO_DATA", "MemoryPrediction", "predict_memory"]
