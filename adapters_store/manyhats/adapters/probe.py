"""What a registration needs from the engine, as callables: the store itself knows no engine."""

from __future__ import annotations

from collections.abc import Callable

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter

Probe = Callable[[LoweredAdapter], float]
"""How far an adapter moves the base's logits, 0 for not at all. Runs on the registering thread; raises
AdapterInvalidError if the logits are not finite."""

Prepare = Callable[[AdapterRecord, LoweredAdapter], None]
"""Called with a version that is about to become active, with its bytes stored but its row not yet, so that it can
be loaded before its first request, from what registration has already lowered. The record's version number may not be
assigned yet."""
