"""Rotations of the heads that models have, with and without norms."""

from __future__ import annotations

from manyhats.engine.backends.cuda.attention.rotary import constants_of
from manyhats.engine.backends.cuda.triton.rotary import rotate_and_store
from manyhats.engine.model.architecture import Attention, Norm, Rope
from support.gpu.compiling import Entry

FLOATS = ("cos", "sin", "query_weight", "query_bias", "key_weight", "key_bias")
TYPES = {
    **dict.fromkeys(("qkv", "queries", "keys", "values"), "*bf16"),
    **dict.fromkeys(FLOATS, "*fp32"),
    **dict.fromkeys(("QUERY_EPS", "KEY_EPS"), "fp32"),
    "positions": "*i32",
    "cells": "*i64",
    "QKV_STRIDE": "i32",
}


def entry(sm: int, heads: int, kv_heads: int, size: int, rotary: int, norm: Norm | None = None) -> Entry:
    attention = Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        scale=1.0,
        rope=Rope((1.0,) * (rotary // 2)),
        query_norm=norm,
        key_norm=norm,
    )
    return Entry(
        rotate_and_store,
        sm,
        TYPES,
        constants_of(attention),
        aligned=frozenset(("QKV_STRIDE",)),
        num_warps=1,
        enable_fp_fusion=False,
    )


ENTRIES = [
    entry(80, 32, 8, 128, 128),
    entry(86, 32, 32, 80, 32),
    entry(89, 16, 8, 128, 128, Norm(1e-6, span="head")),
    entry(90, 32, 32, 128, 128, Norm(1e-6, span="row")),
]
