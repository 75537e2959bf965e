"""Random numbers by counter: the same (seed, step) gives the same number, whatever was drawn before."""

from __future__ import annotations

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) with 53 random bits for output token ``step`` of a row with this seed.

    SplitMix64, whose state after n draws is start + (n + 1)·γ, started at mix(seed + γ) so that neighbouring
    seeds have nothing in common.

    Args:
        seed: in [0, 2^64).
        step: at least 0.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    start = _mix(seed + _GAMMA)
    return float((_mix(start + (step + 1) * _GAMMA) >> 11) * 2.0**-53)


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
