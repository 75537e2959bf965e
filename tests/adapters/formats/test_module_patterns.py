"""Pattern keys match as PEFT matches them: names and their ends, and any regular expression that RE2 runs."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from manyhats.adapters.errors import AdapterInvalidError
from manyhats.adapters.formats.peft.module_patterns import compile_patterns

MODULES = [
    f"{head}model.layers.{layer}.{name}"
    for head in ("", "base.")
    for layer in (1, 11)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]
PARTS = st.lists(
    st.sampled_from(
        ["model", "layers", "1", "11", "self_attn", "q_proj", "v_proj", "mlp.up_proj", "proj", "base"]
    ),
    min_size=1,
    max_size=4,
).map(".".join)
ALTERNATIVES = st.builds(
    lambda head, name, tail, escaped: head + (name.replace(".", r"\.") if escaped else name) + tail,
    st.sampled_from(["", "^"]),
    PARTS,
    st.sampled_from(["", "$"]),
    st.booleans(),
)
PATTERNS = st.lists(
    st.sampled_from(
        [
            *(
                "model",
                "layers",
                r"\.",
                ".",
                r"\d+",
                "[01]",
                "1{1,2}",
                "self_attn",
                "mlp",
                "[qv]_proj",
                r"\w+_proj",
            ),
            *(
                "(q|v)_proj",
                "(?:up_)?proj",
                ".*",
                ".*?",
                r"(self_attn\.)?",
                "^",
                "$",
                "|",
                r"\b",
                r"(?P<layer>\d)",
            ),
        ]
    ),
    max_size=6,
).map("".join)
KEYS = st.lists(ALTERNATIVES, min_size=1, max_size=3).map("|".join) | PATTERNS


@given(keys=st.lists(KEYS, min_size=1, max_size=3, unique=True), module=st.sampled_from(MODULES))
def test_keys_match_as_peft_matches_them(keys: list[str], module: str) -> None:
    for key in keys:
        with contextlib.suppress(re.error):
            re.compile(key)
            continue
        with pytest.raises(AdapterInvalidError):
            compile_patterns("rank_pattern", {key: 1})
        return
    values = {key: rank for rank, key in enumerate(keys, 1)}
    expected = values.get(get_pattern_key(values, module), 0)
    assert compile_patterns("rank_pattern", values).value_for(module, 0) == expected


@pytest.mark.parametrize(
    ("key", "matches"),
    [
        ("^model.layers.1.self_attn.q_proj$", True),
        ("^model.layers.1.self_attn.q_proj", True),
        (r"^model\.layers\.1\.self_attn\.q_proj$", True),
        ("q_proj$", True),
        ("v_proj|q_proj", True),
        ("^q_proj", False),
        ("^odel.layers.1.self_attn.q_proj", False),
        ("roj", False),
        ("v_proj", False),
        (".*q_proj", True),
        ("[qk]_proj", True),
        (r"layers\.(0|1)\..*", True),
        (r"layers\.(0|2)\..*", False),
        (r"model\.layers\.[0-9]{1,2}\.self_attn\.(q|v)_proj", True),
        (r"(?:self_attn|mlp)\.\w+", True),
        (r"(?i:Q_PROJ)", True),
        ("q_proj|", True),
        ("q_proj+", True),
        ("", False),
        ("^", False),
        ("a$b", False),
    ],
)
def test_anchored_keys(key: str, matches: bool) -> None:
    module = "model.layers.1.self_attn.q_proj"
    assert (get_pattern_key([key], module) == key) == (
        compile_patterns("f", {key: 3}).value_for(module, 0) == 3
    )
    assert compile_patterns("f", {key: 3}).value_for(module, 0) == (3 if matches else 0)


def test_the_first_key_that_matches_wins() -> None:
    patterns = compile_patterns(
        "rank_pattern", {r"layers\.0\..*": 2, ".*proj": 3, r"layers\.\d\.mlp.*": 4, "lm_head|.*norm": 5}
    )
    modules = [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.gate",
        "lm_head",
    ]
    assert [patterns.value_for(module, 8) for module in modules] == [2, 3, 4, 5]
    assert patterns.value_for("model.layers.10.mlp.gate", 8) == 8
