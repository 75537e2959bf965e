from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.config_file import make_config
from support.harnesses.doctor import Make


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Settings of a server whose home and store are in a directory of the test's own."""
    monkeypatch.setenv("MANYHATS_HOME", str(tmp_path / "home"))

    def of(**settings: Any) -> ServeConfig:
        return make_config({"model": "m", "store": tmp_path / "store", **settings})

    return of


@pytest.fixture
def as_nobody(tmp_path: Path) -> Iterator[None]:
    """Root may write everywhere: from here on, this process is another user, who may read the test's directory."""
    if os.geteuid() != 0:
        yield
        return
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
