"""Where the gates of loaded adapters' prefixes lie, for the kernel."""

from __future__ import annotations

import numpy as np

from manyhats.adapters.primitives import PrefixGate
from manyhats.engine.backends.cpu.adapters import gates
from manyhats.engine.backends.cpu.adapters.tables import AdapterMemory, Fields, SlotTable, gate_addresses
from manyhats.engine.errors import ModelError


class PrefixEntries:
    """The gates of one adapter's prefix, layer by layer."""

    def __init__(self, num_layers: int) -> None:
        columns = gates.KEY_GATE, gates.VALUE_GATE
        self.fields: Fields = {column: np.zeros(num_layers, np.int64) for column in columns}

    def add(self, delta: PrefixGate, memory: AdapterMemory) -> None:
        """Enters a layer's gate.

        Raises:
            ModelError: the layer has one already.
        """
        if self.fields[gates.KEY_GATE][delta.site.layer]:
            raise ModelError(f"{delta.site}: one gate a site, not two")
        addresses = gate_addresses(delta.gate, memory)
        self.fields[gates.KEY_GATE][delta.site.layer] = addresses[0]
        self.fields[gates.VALUE_GATE][delta.site.layer] = addresses[-1]


class PrefixTable(SlotTable):
    """Of prefixes in all layers: their gates.

    Attributes:
        row: [columns] int64, of the kernel's table.
    """

    def __init__(self, num_layers: int, num_slots: int) -> None:
        super().__init__(PrefixEntries(num_layers).fields, num_slots)
        self._has_gates = np.zeros(num_layers, dtype=np.uint8)
        self.row = self._addresses(gates.NUM_PREFIX_COLUMNS, {gates.HAS_PREFIX_GATES: self._has_gates})

    def _note_used(self) -> None:
        self._has_gates[:] = self._fields[gates.KEY_GATE].any(axis=1)
