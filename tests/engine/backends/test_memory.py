"""How a GPU's memory is divided, for cards and models of every size; what is left is what docs/gpu.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine.backends.dtypes import block_bytes
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.memory import DeviceMemory, run_largest
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.backends.torch.batched.model import BatchedModel
from manyhats.engine.checkpoints.size import weight_bytes
from manyhats.engine.config import EngineConfig, limits_of
from manyhats.engine.errors import ModelError
from manyhats.engine.model.families.reading import read_family
from manyhats.engine.model.layout import Family
from support.factories.tiny_encoders import make_encoder
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import load_tiny

GB, GIB, BLOCK = 10**9, 2**30, 16
LIMITS = Limits(max_rows=2048, max_sequences=64, adapter_bytes=2 * GIB, memory_fraction=0.9)
STEP = 3 * GIB // 2
"""Assumed of the largest step."""
CARDS = (24, 40, 80, 141)


def config(hidden: int, width: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> Family:
    fields: dict[str, Any] = {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 1e6,
    }
    return read_family(fields)


MODELS = {
    "1.5B": config(1536, 8960, 28, 12, 2, 151_936, True),
    "8B": config(4096, 14_336, 32, 32, 8, 128_256, False),
    "14B": config(5120, 13_824, 48, 40, 8, 152_064, False),
    "32B": config(5120, 27_648, 64, 40, 8, 152_064, False),
    "70B": config(8192, 28_672, 80, 64, 8, 128_256, False),
}


def memory_of(card: int, family: Family) -> DeviceMemory:
    used = weight_bytes(family, is_nf4=True) + GIB // 2  # and what CUDA itself takes
    return DeviceMemory(total=card * GB, used=used, step=STEP, adapters=2 * GIB, fraction=0.9)


def tokens_of(card: int, name: str) -> int:
    """Of the KV cache in bfloat16; 0 where the model does not fit."""
    architecture = MODELS[name].architecture
    size = block_bytes(architecture, BLOCK, "bfloat16")
    try:
        return memory_of(card, MODELS[name]).cache_bytes(architecture, size, BLOCK, LIMITS) // size * BLOCK
    except ModelError:
        return 0


def test_what_must_fit_fits() -> None:
    assert tokens_of(24, "8B") > 80_000
    assert tokens_of(24, "14B") > 30_000
    assert tokens_of(24, "70B") == tokens_of(24, "32B") == tokens_of(40, "70B") == 0
    assert tokens_of(80, "70B") > 80_000
    assert tokens_of(141, "70B") > 200_000


def test_small_models_take_no_more_than_their_sequences_can_fill() -> None:
    assert tokens_of(141, "1.5B") == 64 * 32_768


def row_of(name: str) -> str:
    cells = [tokens_of(card, name) // 1000 for card in CARDS]
    return f"| {name} | " + " | ".join(f"{cell}k" if cell else "–" for cell in cells) + " |"


@pytest.mark.parametrize("name", MODELS)
def test_the_docs_say_what_the_function_says(name: str) -> None:
    assert row_of(name) in (Path(__file__).parents[3] / "docs/gpu.md").read_text()


@given(
    total=st.integers(1, 200 * GB),
    used=st.integers(0, 100 * GB),
    step=st.integers(0, 10 * GB),
    adapters=st.integers(0, 10 * GB),
    fraction=st.floats(0.1, 1.0),
)
def test_all_parts_together_stay_within_the_fraction(
    total: int, used: int, step: int, adapters: int, fraction: float
) -> None:
    memory = DeviceMemory(total=total, used=used, step=step, adapters=adapters, fraction=fraction)
    architecture = MODELS["8B"].architecture
    size = block_bytes(architecture, BLOCK, "bfloat16")
    try:
        taken = memory.cache_bytes(architecture, size, BLOCK, LIMITS)
    except ModelError:
        assert memory.left < size
    else:
        assert taken % size == 0
        assert used + step + adapters + taken <= total * fraction


def test_where_nothing_is_left_the_error_says_what_takes_it() -> None:
    architecture = MODELS["70B"].architecture
    with pytest.raises(ModelError, match=r"22.4 GiB.*37.3 GiB are in use.*--gpu-memory-fraction"):
        memory_of(24, MODELS["70B"]).cache_bytes(architecture, 1 << 20, BLOCK, LIMITS)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_largest_step_runs_and_has_all_results(tmp_path: Path, kind: str) -> None:
    make = make_checkpoint if kind == "decoder" else make_encoder
    model = load_tiny(make(tmp_path / "model", seed=3))
    backend = TorchBackend(by_row=False)
    prepared = backend.prepare(model.architecture, model.weights)
    assert isinstance(prepared, BatchedModel)
    limits = Limits(max_rows=70, max_sequences=9, adapter_bytes=0, memory_fraction=0.9)
    found = run_largest(
        backend, prepared, backend.new_adapters(model.architecture, 1, "float32"), BLOCK, "float32", limits
    )
    sizes = (len(found.tokens), len(found.targets), len(found.hidden))
    assert sizes == ((9, 70, 0) if kind == "decoder" else (0, 0, 70))
    assert not found.bad_rows


def test_on_the_cpu_the_cache_needs_a_size(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=3))
    limits = limits_of(EngineConfig(), model.architecture)
    backend = TorchBackend(by_row=False, limits=limits)
    backend.prepare(model.architecture, model.weights)
    with pytest.raises(ModelError, match="needs a size"):
        backend.new_cache(model.architecture, BLOCK, "float32", None)
