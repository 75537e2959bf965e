"""Predicts from shapes alone how much memory a training run will need."""

from __future__ import annotations

from manyhats.trainer.memory.dry_run import NO_DATA, predict_memory
from manyhats.trainer.memory.prediction import MemoryPrediction

__all__ = ["NO_DATA", "MemoryPrediction", "predict_memory"]
