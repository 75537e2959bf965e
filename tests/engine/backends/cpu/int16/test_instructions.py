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
from manyhats.engine.backends.cpu.int16.tile import decode_words, nf4_tile

SIZE, WORD = 128, 16
WORDS = SIZE // 8 * WORD
packed_tile, decoded_tile = nf4_tile(2, 1, is_decoded=False), nf4_tile(3, 1, is_decoded=True)


@njit
def run(x, q, codes, panel, scales, units, bias, y):
    for row in range(5):
        quantize_row(x, row * SIZE, SIZE, q, row)
    for word in range(0, WORDS, WORD):
        decode_words(codes, word, panel, 4 * word)
    packed_tile(codes, codes, scales, units, bias, q, y, 0, 0, 0, 1, 0, 5, SIZE, 16)
    decoded_tile(panel, codes, scales, units, bias, q, y, 0, 0, 0, 1, 2, 5, SIZE, 16)


generator = np.random.default_rng(5)
x = generator.standard_normal(5 * SIZE, dtype=np.float32)
x[3 * SIZE] = 1e4
codes = generator.integers(-(2**31), 2**31, WORDS, dtype=np.int64).astype(np.int32)
scales = generator.integers(1, 2**15, SIZE // 64 * 16).astype(np.uint16)
units, bias = (generator.standard_normal(16, dtype=np.float32) for _ in range(2))
q, panel, y = np.zeros(5 * (SIZE // 2 + SIZE // 64), np.int32), np.zeros(4 * WORDS, np.int32), np.zeros(80, np.float32)
run(x, q, codes, panel, scales, units, bias, y)
assert np.abs(y).min() > 0
print(instructions.has_instructions(), hashlib.sha256(b"".join(each.tobytes() for each in (q, panel, y))).hexdigest())
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
