"""The golden references beside the checkout: numbers that other libraries gave on the default model."""

from __future__ import annotations

from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden references beside the checkout")
