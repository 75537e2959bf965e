"""kill -9, and errors of the disk, at every I/O call of a store: ``python -m store_faults``, in ``tests``.

Each operation is done again and again, in a process of its own, and comes to harm at its first call, its second, and
so on, those of SQLite included. Then the store is opened anew. It must hold the old state or the new one, every byte
of every version, and nothing that no version needs; and the operation must work.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from store_faults.preload import run_preloaded

with tempfile.TemporaryDirectory(prefix="store-faults-") as directory:
    sys.exit(run_preloaded(Path(directory), "store_faults.campaign", sys.argv[1:]))
