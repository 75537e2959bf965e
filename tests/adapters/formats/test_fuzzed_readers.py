"""The readers on inputs that are almost good; `make fuzz` does the same for longer, led by coverage."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzzing.mutators import mutated_value
from fuzzing.targets import FILE, LIMITS, Sample, samples, targets
from manyhats.adapters.formats.json_reader import parse_json_object
from manyhats.adapters.formats.safetensors_reader import header_size, parse_header

RANDOMS = st.randoms(use_true_random=False)


def with_a_byte_changed(data: bytes, random: Random) -> bytes:
    if not data:
        return b"{"
    position = random.randrange(len(data))
    return data[:position] + bytes([random.randrange(256)]) + data[position + random.randrange(3) :]


@pytest.mark.parametrize("name", ["json", "config", "safetensors"])
@settings(max_examples=250, deadline=None)
@given(random=RANDOMS, times=st.integers(1, 3))
def test_changed_inputs_end_in_a_value_or_an_adapter_error(name: str, random: Random, times: int) -> None:
    target = targets()[name]
    data = random.choice(target.seeds)
    for _ in range(times):
        data = target.mutate(data, random, target.words, lambda part: with_a_byte_changed(part, random))
    target.run(data)


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(samples()), RANDOMS)
def test_one_field_changed_ends_in_a_value_or_an_adapter_error(sample: Sample, random: Random) -> None:
    words = targets()["config"].words
    targets()["config"].run(json.dumps(mutated_value(sample.config, random, words)).encode())


def test_what_is_changed_is_good() -> None:
    for seed in targets()["config"].seeds:
        assert parse_json_object(
            seed, "config", max_bytes=LIMITS.max_config_bytes, max_depth=LIMITS.max_config_depth
        )
    for seed in targets()["safetensors"].seeds:
        size = header_size(seed[:8], len(seed), FILE, LIMITS)
        assert parse_header(seed[:size], len(seed), FILE, LIMITS).tensors


def test_targets_fail_where_a_reader_raises_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("fuzzing.targets.parse_json_object", broken)
    monkeypatch.setattr("fuzzing.targets.parse_header", broken)
    for name, target in targets().items():
        with pytest.raises(KeyError):
            target.run(targets()[name].seeds[0])
