"""AdapterHub artifacts, lowered and applied to the default model, against what the library itself gave."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manyhats.adapters.disk.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.adapters.sites import BaseDescription
from manyhats.engine.model.describe import describe
from manyhats.engine.model.families.reading import read_family
from support.factories.default_model import default_model_directory
from support.oracles.golden import ADAPTERHUB_FIXTURES, GOLDEN, adapterhub_directory, needs_golden
from support.oracles.primitives import logits_with

pytestmark = [pytest.mark.real_model, needs_golden]

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def model() -> Any:
    transformers: Any = import_module("transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        default_model_directory(), dtype=torch.float32, attn_implementation="eager"
    )
    loaded.train(False)
    return loaded


@pytest.fixture(scope="module")
def base() -> BaseDescription:
    config = json.loads((default_model_directory() / "config.json").read_text())
    return describe(
        read_family(config),
        names=["HuggingFaceTB/SmolLM2-135M-Instruct"],
        digest="sha256:" + "0" * 64,
    )


@pytest.fixture
def directory(fixture: str, tmp_path: Path) -> Path:
    return adapterhub_directory(fixture, tmp_path / "converted")


@pytest.mark.parametrize("fixture", ADAPTERHUB_FIXTURES)
def test_logits_are_the_librarys(fixture: str, directory: Path, model: Any, base: BaseDescription) -> None:
    with open_source(str(directory), [directory.parent]) as source:
        read = read_adapter(source, base, AdapterLimits())
    assert read.artifact.method is ADAPTERHUB_FIXTURES[fixture]
    assert read.notes == ()
    lowered = lower(read.artifact, base)
    expected = np.load(GOLDEN / fixture / "expected_dense.npz")
    for prompt in range(3):
        ids = torch.from_numpy(expected[f"p{prompt}_ids"]).long()
        logits = logits_with(model, lowered, ids)
        assert_close(logits[-1], expected[f"p{prompt}_last_logits"])
        best = torch.from_numpy(expected[f"p{prompt}_top10_ids"]).long()
        assert_close(logits.gather(1, best), expected[f"p{prompt}_top10_logits"])
        following = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        assert_close(following, expected[f"p{prompt}_next_logprob"])


def assert_close(actual: Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=TOLERANCE, rtol=0)
