"""Pattern keys match as PEFT matches them, anchored ones and alternatives too; what could take long is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from manyhats.adapters.errors import AdapterUnsupportedError
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
KEYS = st.lists(ALTERNATIVES, min_size=1, max_size=3).map("|".join)


@given(keys=st.lists(KEYS, min_size=1, max_size=3, unique=True), module=st.sampled_from(MODULES))
def test_keys_match_as_peft_matches_them(keys: list[str], module: str) -> None:
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
    ],
)
def test_anchored_keys(key: str, matches: bool) -> None:
    module = "model.layers.1.self_attn.q_proj"
    assert (get_pattern_key([key], module) == key) == (
        compile_patterns("f", {key: 3}).value_for(module, 0) == 3
    )
    assert compile_patterns("f", {key: 3}).value_for(module, 0) == (3 if matches else 0)


@pytest.mark.parametrize(
    "key",
    [
        ".*q_proj",
        "(a|b)",
        "[qv]_proj",
        "q_proj+",
        "q{2}",
        "(a+)+$",
        r"\d",
        "",
        "a||b",
        "|a",
        "^",
        "a^b",
        "a$b",
    ],
)
def test_more_of_a_regular_expression_is_refused_by_name(key: str) -> None:
    with pytest.raises(
        AdapterUnsupportedError, match="uses more regular expression syntax than is supported"
    ):
        compile_patterns("rank_pattern", {key: 3})
