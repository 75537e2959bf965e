from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import Prompt, Runner, load_tiny, random_ids
from support.oracles.transformers import full_logits, load_transformers

THETA = 10000.0
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": THETA, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": THETA,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn, tuned": {
        "rope_type": "yarn",
        "rope_theta": THETA,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": THETA,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.01 * i for i in range(8)],
        "long_factor": [1.0 + 0.3 * i for i in range(8)],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_for_every_kind_of_rope(kind: str, tmp_path: Path) -> None:
    directory = make_checkpoint(
        tmp_path / "model", rope=KINDS[kind], seed=7, head_dim=16, max_position_embeddings=256
    )
    # transformers takes longrope's long factors for texts longer than the model was trained on; the engine
    # always does, when it serves such lengths. So the text is a long one.
    prompt = Prompt(random_ids(1, 150, TINY_VOCAB_SIZE), new_tokens=4)
    ran = Runner(load_tiny(directory)).run([prompt], all_logits=True, max_tokens=40)[0]
    expected = full_logits(load_transformers(directory), ran.token_ids)
    torch.testing.assert_close(ran.stacked, expected, atol=1e-4, rtol=1e-4)


def test_the_kinds_differ(tmp_path: Path) -> None:
    """Otherwise the test above shows little."""
    logits = []
    for name, rope in KINDS.items():
        directory = make_checkpoint(
            tmp_path / name, rope=rope, seed=7, head_dim=16, max_position_embeddings=256
        )
        prompt = Prompt(random_ids(1, 60, TINY_VOCAB_SIZE), new_tokens=0)
        logits.append(Runner(load_tiny(directory)).run([prompt])[0].stacked)
    plain = make_checkpoint(tmp_path / "plain", seed=7, head_dim=16, max_position_embeddings=256)
    prompt = Prompt(random_ids(1, 60, TINY_VOCAB_SIZE), new_tokens=0)
    base = Runner(load_tiny(plain)).run([prompt])[0].stacked
    for name, other in zip(KINDS, logits, strict=True):
        # Up to the length it was trained on, dynamic is the plain kind.
        assert ((other - base).abs().max() > 0.05) == (name != "dynamic"), name
