"""Every processor's instructions give the same bits: the widest that this one has, narrower ones, and plain LLVM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DIGEST = """
import hashlib, sys
from manyhats.engine.backends.cpu import simd

hidden = sys.argv[1:]
simd.has_feature = lambda name, known=simd.has_feature: known(name) and not name.startswith(tuple(hidden))

import numpy as np
from numba import njit
from manyhats.engine.backends.cpu.int16 import instructions
from manyhats.engine.backends.cpu.int16.quantize import quantize_row
from manyhats.engine.backends.cpu.int16.tile import make_decoder, make_tile

SIZE = 128
OCTETS = SIZE // 8


def runner(codes):
    stride = 16 * codes.num_words
    decode = make_decoder(codes)
    packed_tile, decoded_tile = make_tile(codes, 2, is_decoded=False), make_tile(codes, 3, is_decoded=True)

    @njit
    def run(x, q, weights, panel, scales, units, bias, y):
        for row in range(5):
            quantize_row(x, row * SIZE, SIZE, q, row)
        for octet in range(OCTETS):
            decode(weights, octet * stride, panel, 64 * octet)
        packed_tile(weights, weights, scales, units, bias, q, y, 0, 0, 0, 0, 5, SIZE, 16)
        decoded_tile(panel, weights, scales, units, bias, q, y, 0, 0, 0, 2, 5, SIZE, 16)

    return run


generator = np.random.default_rng(5)
x = generator.standard_normal(5 * SIZE, dtype=np.float32)
x[3 * SIZE] = 1e4
weights = generator.integers(-(2**31), 2**31, 32 * OCTETS, dtype=np.int64).astype(np.int32)
scales = generator.integers(1, 2**15, SIZE // 64 * 16).astype(np.uint16)
units, bias = (generator.standard_normal(16, dtype=np.float32) for _ in range(2))
digest = hashlib.sha256()
for codes in (instructions.NF4, instructions.INT8):
    q, panel = np.zeros(5 * (SIZE // 2 + SIZE // 64), np.int32), np.zeros(64 * OCTETS, np.int32)
    y = np.zeros(80, np.float32)
    runner(codes)(x, q, weights, panel, scales, units, bias, y)
    assert np.abs(y).min() > 0
    for each in (q, panel, y):
        digest.update(each.tobytes())
print(instructions.has_instructions(), digest.hexdigest())
"""


def digest(*hidden: str, cache: Path) -> list[str]:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", DIGEST, *hidden], env=environment, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout.split()


def test_all_instructions_give_the_same_bits(tmp_path: Path) -> None:
    (_, widest), (_, without_dot), (_, without_avx512), (is_fast, plain) = (
        digest(*hidden, cache=tmp_path / str(index))
        for index, hidden in enumerate(((), ("avx512vnni", "avxvnni"), ("avx512", "avxvnni"), ("avx",)))
    )
    assert widest == without_dot == without_avx512 == plain
    assert is_fast == "False"
