"""What can be trained: one file per method, and what they share."""

from __future__ import annotations

from manyhats.trainer.methods.making import default_learning_rate, make_adapter
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.methods.warm_start import load_tensors

__all__ = ["ParametrizedAdapter", "default_learning_rate", "load_tensors", "make_adapter"]
