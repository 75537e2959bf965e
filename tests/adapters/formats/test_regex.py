"""What RE2 answers is what Python's ``re`` answers, or the pattern is refused; and it answers in bounded time."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
)
from manyhats.adapters.formats.peft.module_patterns import compile_patterns
from manyhats.adapters.formats.peft.regex import RegexSet, translate

PATHS = [
    f"{head}model.layers.{layer}.{name}"
    for head in ("", "base.")
    for layer in (0, 1, 11)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]
# Short, since Python may backtrack; not empty, since there its \\B says no before 3.14.
TEXTS = st.sampled_from(["q_proj", "mlp.q_proj", "layers.1.q", "lm_head"]) | st.text(
    "aABb_.019-z", min_size=1, max_size=8
)

_CHARACTERS = st.sampled_from("aAbBzZ_019.-") | st.sampled_from(["q_proj", "layers", "mlp", r"\."])
_SET_ITEMS = st.sampled_from(
    [
        "a",
        "B",
        "_",
        "0-9",
        "a-z",
        "A-Z",
        "Z-a",
        "-",
        "^",
        ".",
        "[",
        "&&",
        r"\d",
        r"\W",
        r"\]",
        r"\b",
        r"\x41",
        r"\-",
    ]
)
_SETS = st.builds(
    lambda start, items: f"[{start}{''.join(items)}]",
    st.sampled_from(["", "^", "]", "^]"]),
    st.lists(_SET_ITEMS, min_size=1, max_size=3),
)
_ITEMS = (
    _CHARACTERS
    | _SETS
    | st.sampled_from([".", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"\_", r"\x61", "{", "}"])
)
_ASSERTIONS = st.sampled_from(["^", "$", r"\b", r"\B", r"\A", r"\Z"])
_REPEATS = st.builds(
    str.__add__,
    st.sampled_from(["*", "+", "?", "{2}", "{,2}", "{1,}", "{0,3}", "{,}", "{0}"]),
    st.sampled_from(["", "?"]),
)
_GROUPS = st.sampled_from(["(", "(?:", "(?P<name>", "(?i:", "(?s:", "(?m-i:", "(?-i:"])


def _within(patterns: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    groups = st.builds(lambda group, inner: f"{group}{inner})", _GROUPS, patterns)
    return (
        st.builds("{}{}".format, _ITEMS | groups, _REPEATS)
        | st.lists(patterns | _ASSERTIONS, max_size=4).map("".join)
        | st.lists(patterns, min_size=2, max_size=3).map("|".join)
        | groups
    )


GRAMMAR = st.recursive(_ITEMS, _within, max_leaves=12)
"""Patterns that both engines run, but for a few: Python refuses a name that comes twice."""


def python_matches(pattern: str, text: str) -> bool:
    with warnings.catch_warnings():
        # Of sets such as [[a]: they may mean something else one day.
        warnings.simplefilter("ignore", FutureWarning)
        return re.fullmatch(pattern, text) is not None


def re2_matches(pattern: str, text: str) -> bool:
    return RegexSet("field", [translate(pattern, "field", "the key")]).first_match(text) is not None


@settings(max_examples=600, deadline=None)
@given(pattern=GRAMMAR, text=TEXTS)
def test_patterns_of_the_grammar_are_run_as_python_runs_them(pattern: str, text: str) -> None:
    try:
        expected = python_matches(pattern, text)
    except re.error:
        with pytest.raises(AdapterInvalidError):
            translate(pattern, "field", "the key")
        return
    assert re2_matches(pattern, text) == expected


@settings(max_examples=600, deadline=None)
@given(pattern=st.text(r"ab_.019\^$|?*+(){}[]-,:=!<>#PidDwxAZzn", max_size=10), text=TEXTS)
@example(pattern="[[:alpha:]]", text="a]")
@example(pattern="a{,}", text="aaa")
@example(pattern="a{1", text="a{1")
@example(pattern="(?P<n>a)(?P<n>b)", text="ab")
@example(pattern=r"\pN", text="1")
@example(pattern=r"\Qa\E", text="a")
@example(pattern="(?U:a*)", text="a")
@example(pattern="(?<n>a)", text="a")
def test_any_text_is_run_as_python_runs_it_or_refused(pattern: str, text: str) -> None:
    try:
        actual = re2_matches(pattern, text)
    except AdapterInvalidError:
        with pytest.raises((re.error, RecursionError, OverflowError)):
            python_matches(pattern, text)
        return
    except AdapterError:
        return
    assert actual == python_matches(pattern, text)


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("(?=q)", "a lookahead"),
        ("(?!v)q_proj", "a lookahead"),
        ("(?<=x)q", "a lookbehind"),
        ("(?<!x)q", "a lookbehind"),
        ("(?P<a>x)(?P=a)", "a backreference"),
        (r"(x)\1", "a backreference"),
        ("(x)?(?(1)a|b)", "a condition"),
        ("(?>a)", "an atomic group"),
        ("a*+", "possessive repetition"),
        ("a{2}+", "possessive repetition"),
        ("(?i)q_proj", "flags"),
        ("(?x:q _proj)", "flags"),
        ("(?#why)q", "a comment"),
        (r"\u0041", "a character by its code"),
        (r"[\N{DIGIT ONE}]", "a character by its code"),
        ("é", "characters other than ASCII"),
    ],
)
def test_what_re2_does_not_have_is_refused_by_name(pattern: str, what: str) -> None:
    with pytest.raises(AdapterUnsupportedError) as caught:
        compile_patterns("alpha_pattern", {"q_proj": 1, pattern: 2})
    assert caught.value.subject == "alpha_pattern"
    assert f"'{pattern}' uses {what}" in caught.value.description


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        ")",
        "a)|(b",
        "[",
        "[a",
        "[]",
        "*",
        "|*",
        "^*",
        r"\b+",
        "a**",
        "a{2}{3}",
        "a{3,2}",
        "[b-a]",
        r"[\d-a]",
        "(?P<1>a)",
        "(?P<a",
        "(?z:a)",
        "(?i-i:a)",
        "(?",
        "\\",
        r"\q",
        r"\x4",
        r"[\A]",
        "(?P<a>x)(?P<a>x)",
    ],
)
def test_what_is_no_regular_expression_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(re.error):
        re.compile(pattern)
    with pytest.raises(AdapterInvalidError, match="is not a regular expression: ") as caught:
        translate(pattern, "rank_pattern", "the key")
    assert f"'{pattern}'" in caught.value.description


@pytest.mark.parametrize(
    "pattern",
    [
        "(a{1000}){1000}",
        "((a{0,30}){0,30}){0,30}",
        "a{1001}",
        "a{9999999999}",
        "(" * 101 + ")" * 101,
        "(?:.{0,1000}[a-z]){300}",
        "a" * 4097,
    ],
)
def test_what_takes_too_much_is_refused(pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(AdapterTooLargeError) as caught:
        RegexSet("rank_pattern", [translate(pattern, "rank_pattern", "the key")])
    assert caught.value.subject == "rank_pattern"
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "pattern", ["(x+x+)+y", "(a|aa)+b", "(.*)*(.*)*X", ".*" * 200 + "X", "(?:a?){500}a{500}", r"(\w+\.?)*!"]
)
def test_what_would_backtrack_for_ever_is_answered_at_once(pattern: str) -> None:
    patterns = compile_patterns("rank_pattern", {pattern: 1})
    start = time.monotonic()
    assert all(patterns.value_for(text, 0) == 0 for text in (*PATHS, "x" * 300, "a" * 300))
    assert time.monotonic() - start < 1


HOSTILE_KEYS = {
    "optional characters": "{}|" + ".?" * 250,
    "long repetitions": "{}|[a-z_0-9.]*.{{0,900}}x",
    "choices in repetitions": "{}|" + "(?:a|b|[a-z]|.|e?l*){{150}}",
    "long names": "a" * 500 + "{}",
    "word boundaries": r"{}|(?:\b.*\B.*){{200}}X",
    "ignored case": "{}|(?i:[a-z]+[^q]){{100}}",
}
_IN_A_PROCESS = """
import resource, sys, time
from manyhats.adapters.errors import AdapterTooLargeError
from manyhats.adapters.formats.peft.module_patterns import compile_patterns
num_keys, before = 4096, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
while True:
    try:
        patterns = compile_patterns("f", {sys.argv[1].format(i): i for i in range(num_keys)})
        break
    except AdapterTooLargeError:
        num_keys //= 2
for layer in range(40):
    patterns.value_for(f"model.layers.{layer}.self_attn.q_proj", 0)
print(num_keys, time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""


@pytest.mark.parametrize("keys", HOSTILE_KEYS.values(), ids=HOSTILE_KEYS.keys())
def test_as_many_large_keys_as_are_compiled_take_bounded_time_and_memory(keys: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", _IN_A_PROCESS, keys], check=True, capture_output=True, text=True, timeout=120
    )
    num_keys, seconds, mebibytes = map(float, answer.stdout.split())
    assert num_keys >= 1
    assert seconds < 15
    assert mebibytes < 256


def test_thousands_of_plain_keys_are_matched() -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4096)]
    random.Random(0).shuffle(names)
    patterns = compile_patterns("rank_pattern", {name: i for i, name in enumerate(names, 1)})
    assert [patterns.value_for(name, 0) for name in names[:50]] == list(range(1, 51))
    assert patterns.value_for("model.layers.4096.self_attn.q_proj", 0) == 0
    with pytest.raises(AdapterTooLargeError, match="has 4097 keys; the limit is 4096"):
        compile_patterns("rank_pattern", dict.fromkeys([*names, "x"], 1))
    with pytest.raises(AdapterTooLargeError, match="a key of 513 characters; the limit is 512"):
        compile_patterns("rank_pattern", {"x" * 513: 1})
