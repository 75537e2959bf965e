"""``python -m benchmarks.gpu.sanitized``: a small attention and small deltas, for compute-sanitizer to watch."""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu.candidates import sm_of
from benchmarks.gpu.checks.adapters import check_deltas
from benchmarks.gpu.checks.check import Place
from benchmarks.gpu.checks.mixing import check_attention
from benchmarks.gpu.scale import TINY


def main() -> int:
    """0 if they are right, too."""
    device = torch.device("cuda")
    place = Place(TINY, device, sm_of(device))
    found = [each for check in (check_attention, check_deltas) for each in check(place)]
    return 0 if all(each.is_right for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
