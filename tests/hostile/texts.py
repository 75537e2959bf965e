"""Configs that are no config: bytes, JSON and fields."""

from __future__ import annotations

import json
from typing import Any

from hostile.case import CONFIG, Case, config_of, good_config, spoilt
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
)

GOOD = json.dumps(good_config()).encode()
Invalid, TooLarge, Unsupported = AdapterInvalidError, AdapterTooLargeError, AdapterUnsupportedError


def _field(text: str) -> bytes:
    """A good config with one more field, written out."""
    return GOOD[:-1] + b", " + text.encode() + b"}"


TEXTS: dict[str, tuple[bytes, type[Exception]]] = {
    "empty": (b"", Invalid),
    "spaces": (b"   ", Invalid),
    "NUL": (b"\0", Invalid),
    "a list": (b"[]", Invalid),
    "a number": (b"1", Invalid),
    "null": (b"null", Invalid),
    "text": (b'"LORA"', Invalid),
    "an empty object": (b"{}", Invalid),
    "unclosed": (GOOD[:-1], Invalid),
    "two objects": (GOOD + GOOD, Invalid),
    "a comma too many": (GOOD[:-1] + b",}", Invalid),
    "a comment": (b"/* */" + GOOD, Invalid),
    "single quotes": (GOOD.replace(b'"', b"'"), Invalid),
    "YAML": (b"peft_type: LORA\nr: 4\n", Invalid),
    "a pickle": (b"\x80\x04\x95" + bytes(30), Invalid),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, Invalid),
    "UTF-16": (GOOD.decode().encode("utf-16"), Invalid),
    "UTF-32": (GOOD.decode().encode("utf-32"), Invalid),
    "Latin-1": (_field('"x": "é"').decode().encode("latin-1"), Invalid),
    "overlong UTF-8": (GOOD[:-1] + b', "x": "\xc0\xaf"}', Invalid),
    "half a surrogate": (_field(r'"x": "\ud800"'), Invalid),
    "half a surrogate as a key": (_field(r'"\udfff": 1'), Invalid),
    "control character": (GOOD[:-1] + b', "x": "\x01"}', Invalid),
    "a key twice": (_field('"r": 8'), Invalid),
    "a key twice, escaped": (_field(r'"\u0072": 8'), Invalid),
    "a key twice, deep": (_field('"x": {"a": [{"b": 1, "b": 2}]}'), Invalid),
    "NaN": (_field('"lora_dropout2": NaN'), Invalid),
    "Infinity": (_field('"x": Infinity'), Invalid),
    "-Infinity": (_field('"x": [-Infinity]'), Invalid),
    "1e999": (_field('"x": 1e999'), Invalid),
    "a number of 5000 digits": (_field(f'"x": {"1" * 5000}'), Invalid),
    "a fraction of 5000 digits": (_field(f'"x": 0.{"1" * 5000}'), Invalid),
    "hexadecimal": (_field('"x": 0x10'), Invalid),
    "leading zero": (_field('"x": 010'), Invalid),
    "brackets 15000 deep": (b"[" * 15_000, TooLarge),
    "objects 3000 deep": (b'{"a":' * 3000 + b"1" + b"}" * 3000, TooLarge),
    "17 deep": (_field('"x": ' + "[" * 16 + "]" * 16), TooLarge),
    "large": (_field(f'"x": "{"x" * 20_000}"'), TooLarge),
}

_VALUES: list[Any] = [None, True, "4", [], {}, 4.5, -1, 0, 1e308]


def _typed(name: str, value: Any, error: type[Exception]) -> Case:
    text = json.dumps(good_config(**{name: value})).encode()
    return spoilt(f"config {name} = {value!a:.30}", config_of(text), error, name)


CASES = [
    *(spoilt(f"config {name}", config_of(text), error, CONFIG) for name, (text, error) in TEXTS.items()),
    *(_typed("r", value, Invalid) for value in _VALUES),
    *(_typed("r", value, TooLarge) for value in (65, 2**31, 2**63, 10**39)),
    *(_typed("lora_alpha", value, Invalid) for value in (None, True, "16", [], {}, 1e308, 10**39)),
    *(_typed("rank_pattern", value, Invalid) for value in ("q_proj", [], 4, {"q_proj": 1.5}, {"q_proj": -1})),
    *(
        _typed(name, {pattern: 4}, Unsupported)
        for name in ("rank_pattern", "alpha_pattern")
        for pattern in ("(?=a)", "(?<!a)b", r"(\w+\s?)*+", "(?P<a>x)(?P=a)", "(?>a|b)", "(?i)q_proj", "ä")
    ),
    *(
        _typed(name, {pattern: 4}, error)
        for name in ("rank_pattern", "alpha_pattern")
        for pattern, error in (
            ("(a{1000}){1000}", TooLarge),
            ("q_proj{1001}", TooLarge),
            ("(q", Invalid),
            ("*", Invalid),
        )
    ),
    _typed("auto_map", {"AutoModel": "evil.py--Evil"}, Unsupported),
    _typed("_target_", "os.system", Unsupported),
    _typed("__class__", {"__reduce__": "os.system"}, Unsupported),
    _typed("trust_remote_code", True, Unsupported),
    _typed("peft_type", "LoRA", Unsupported),
    _typed("peft_type", ["LORA"], Invalid),
    _typed("peft_type", {"LORA": 1}, Invalid),
    _typed("task_type", "SEQ_CLS", Invalid),
    _typed("task_type", "SEQ_2_SEQ_LM", Unsupported),
    _typed("base_model_name_or_path", "org/tiny\0", Invalid),
    _typed("base_model_name_or_path", "x" * 2000, Invalid),
]
