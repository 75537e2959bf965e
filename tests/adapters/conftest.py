from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base, make_lora


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Four adapters, a0 to a3, in an allowed root."""
    base = make_base(names=("org/tiny",))
    for n in range(4):
        make_lora(tmp_path / "sources" / f"a{n}", base, rank=2, sites=["q_proj", "up_proj"], seed=n)
    return tmp_path / "sources"


@pytest.fixture
def store(tmp_path: Path, sources: Path) -> Iterator[AdapterStore]:
    """A store in ``tmp_path / "store"`` that may read ``sources``."""
    store = open_store(tmp_path / "store", make_base(names=("org/tiny",)), [sources])
    yield store
    store.close()
