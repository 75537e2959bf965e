"""Changes that keep the structure: a JSON value with one thing different, a safetensors file with its length told."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

_NUMBERS = (0, 1, -1, 2, 3, 4, 8, 64, 255, 65536, 2**31, 2**32, 2**47, 2**63, 2**64, -(2**63), 10**39)
_VALUES = (None, True, False, "", [], {}, 0.5, -0.0, 1e-320, 1e38, 1e308, *_NUMBERS)
_LENGTH_BYTES = 8
_MAX_DATA_BYTES = 1024
_SIDES = (0, 0, 1, 2, 3, 8, 2**16, 2**31, 2**32, 2**47, 2**48, 2**63)
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "F8_E4M3": 1, "BOOL": 1}

Mutate = Callable[[bytes], bytes]


def mutated_value(value: Any, random: Random, words: Sequence[str]) -> Any:
    """A copy of a JSON value that differs in one place."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return random.choice(_VALUES)
    container, key = random.choice(places)
    _change(container, key, random, words, value)
    return value


def mutated_json(data: bytes, random: Random, words: Sequence[str], mutate: Mutate) -> bytes:
    """JSON with one to three things different; what is none is mutated as bytes."""
    try:
        value = json.loads(data)
        for _ in range(random.randint(1, 3)):
            value = mutated_value(value, random, words)
        return json.dumps(value, ensure_ascii=random.random() < 0.5).encode()
    except (ValueError, RecursionError):
        return mutate(data)


def reshaped_safetensors(header: dict[str, Any], random: Random) -> bytes:
    """A file in which everything agrees, with the tensors of a header and with one in another shape or dtype."""
    entry = random.choice(list(header.values()))
    entry["dtype"] = random.choice(list(_ITEM_BYTES))
    entry["shape"] = [random.choice(_SIDES) for _ in range(random.randint(0, 6))]
    position = 0
    for each in header.values():
        begin, position = position, position + _num_bytes(each)
        each["data_offsets"] = [begin, position]
    text = json.dumps(header).encode()
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + bytes(min(position, _MAX_DATA_BYTES))


def _num_bytes(entry: dict[str, Any]) -> int:
    if not all(type(side) is int and side >= 0 for side in entry["shape"]):
        raise TypeError("a side is no size")
    return math.prod(entry["shape"]) * _ITEM_BYTES[entry["dtype"]]


def mutated_safetensors(data: bytes, random: Random, words: Sequence[str], mutate: Mutate) -> bytes:
    """A file with another header, of which it mostly tells the right length, or other data."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    header, rest = data[_LENGTH_BYTES : _LENGTH_BYTES + length], data[_LENGTH_BYTES + length :]
    if random.random() < 0.3:
        with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return reshaped_safetensors(json.loads(header), random)
    if random.random() < 0.8:
        header = mutated_json(header, random, words, mutate) if random.random() < 0.8 else mutate(header)
    else:
        rest = mutate(rest)
    return (
        (length if random.random() < 0.05 else len(header)).to_bytes(_LENGTH_BYTES, "little") + header + rest
    )


def _places(value: Any) -> Any:
    """Every (container, key or index) in a value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _change(container: Any, key: Any, random: Random, words: Sequence[str], whole: Any) -> None:
    match random.randrange(6):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[random.choice(words)] = container.pop(key)
        case 2 if isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        case 3:
            container[key] = random.choice(words)
        case 4:
            container[key] = copy.deepcopy(
                random.choice(list(whole.values()) if isinstance(whole, dict) else whole)
            )
        case _:
            container[key] = _another(container[key], random)


def _another(old: Any, random: Random) -> Any:
    if isinstance(old, int) and random.random() < 0.5:
        return old + random.choice((-1, 1, 2, old))
    return random.choice(_VALUES)
