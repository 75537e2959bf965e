"""The golden references beside the checkout: numbers that other libraries gave on the default model."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.lowering.convert import convert

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden"

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden references beside the checkout")

ADAPTERHUB_FIXTURES = {
    "adapterhub_seq_bn": AdapterMethod.BOTTLENECK,
    "adapterhub_double_seq_bn": AdapterMethod.BOTTLENECK,
    "adapterhub_par_bn": AdapterMethod.BOTTLENECK,
    "adapterhub_lora": AdapterMethod.LORA,
    "adapterhub_ia3": AdapterMethod.IA3,
    "adapterhub_prefix": AdapterMethod.PREFIX_TUNING,
    "adapterhub_prefix_flat": AdapterMethod.PREFIX_TUNING,
}
ENCODER_FIXTURES = {
    "tinygpt2_seq_bn": AdapterMethod.BOTTLENECK,
    "tinygpt2_lora_merged": AdapterMethod.LORA,
    "tinyroberta_seq_bn": AdapterMethod.BOTTLENECK,
    "minilm_seq_bn": AdapterMethod.BOTTLENECK,
    "minilm_double_seq_bn": AdapterMethod.BOTTLENECK,
    "minilm_par_bn": AdapterMethod.BOTTLENECK,
    "minilm_lora": AdapterMethod.LORA,
    "minilm_ia3": AdapterMethod.IA3,
    "minilm_prefix": AdapterMethod.PREFIX_TUNING,
}
"""Those in ``encoders``."""


def adapterhub_directory(fixture: str, converted: Path) -> Path:
    """A fixture's adapter; converted into a new directory where the library could save a pickle only."""
    saved = GOLDEN / fixture / "adapter"
    if not (saved / "pytorch_adapter.bin").exists():
        return saved
    convert(saved, converted)
    return converted
