"""What AdapterHub's library saves and computes on encoders, beside what is served from it.

``make test-adapterhub`` runs this with the library in an environment of its own, as it needs another transformers.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from benchmarks import environments

from manyhats.adapters.heads import Pooling
from manyhats.adapters.lowering.convert import convert
from support.factories.tiny_encoders import make_encoder
from support.factories.tiny_models import TINY_VOCAB_SIZE
from support.harnesses.encoding import assert_close, read_all
from support.harnesses.engine import load_tiny, random_ids
from support.oracles import golden

PROGRAM = Path(golden.__file__).with_name("adapterhub_library.py")
ENVIRONMENT = Path(__file__).parents[2] / ".adapterhub"
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "albert grouped")
# None is shorter than the suffixes whose rows change.
TEXTS = tuple(tuple(random_ids(length, length, TINY_VOCAB_SIZE)) for length in (3, 9, 40, 70))
SUBTRACTED = {"noreft": True, "direft": False}
TOLERANCE = 1e-4

pytestmark = [
    pytest.mark.skipif("ADAPTERHUB" not in os.environ, reason="make test-adapterhub installs the library"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the library saved and computed on one family."""
    directory = tmp_path_factory.mktemp(request.param)
    make_encoder(directory / "model", request.param, seed=4)
    (directory / "texts.json").write_text(json.dumps(TEXTS))
    python = environments.python_of(ENVIRONMENT, PROGRAM.with_suffix(".txt"))
    # Isolated: the files beside the program have names of packages.
    command = [str(python), "-I", str(PROGRAM), str(directory / "model"), str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return directory


def served(saved: Path, name: str) -> None:
    """Make what the library saved what a server reads."""
    if (saved / name / "pytorch_adapter.bin").exists():
        (saved / name).rename(saved / f"{name}-pickled")
        convert(saved / f"{name}-pickled", saved / name)
    if name in SUBTRACTED:
        path = saved / name / "adapter_config.json"
        config = json.loads(path.read_text())
        assert "subtract_projection" not in config["config"]
        config["config"]["subtract_projection"] = SUBTRACTED[name]
        path.write_text(json.dumps(config))


def test_every_method_s_values_are_the_library_s(saved: Path) -> None:
    expected = {path.stem: np.load(path) for path in sorted(saved.glob("*.npz"))}
    assert len(expected) > 15
    for name in expected:
        served(saved, name)
    loaded = load_tiny(saved / "model")
    for backend in ("cpu", "torch"):
        found = asyncio.run(read_all(loaded, saved, expected, backend, texts=TEXTS))
        first = asyncio.run(read_all(loaded, saved, expected, backend, texts=TEXTS, pooling=Pooling.FIRST))
        for name, arrays in expected.items():
            rows = [arrays[str(index)] for index in range(len(TEXTS))]
            assert_close(first[name], [each[:1] for each in rows], name, TOLERANCE)
            own = [_own_rows(each, len(ids), name) for each, ids in zip(rows, TEXTS, strict=True)]
            assert_close(found[name], own, name, TOLERANCE)


def _own_rows(rows: np.ndarray, length: int, name: str) -> np.ndarray:
    """The rows of a text's own tokens."""
    before = 1 if name.endswith("after-bos") else 0
    return np.concatenate((rows[:before], rows[len(rows) - length + before :]))
