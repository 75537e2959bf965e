"""Sizes as people write them, from flags and from files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.server.access.errors import ConfigError
from manyhats.server.lifetime.config import SETTINGS as DECLARED
from manyhats.server.lifetime.config_file import make_config
from manyhats.settings.declaration import values_of
from manyhats.settings.sizes import parse_size, size_text

SETTINGS = (
    "kv_cache_bytes",
    "adapter_memory_bytes",
    "gpu_adapter_bytes",
    "max_artifact_bytes",
    "max_bytes_per_task",
    "max_bytes",
    "store_cache_bytes",
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 2**30),
        ("1 GiB", 2**30),
        ("1gib", 2**30),
        (" 512MiB ", 2**29),
        ("0.5GiB", 2**29),
        ("1.5 KiB", 1536),
        ("2TiB", 2**41),
        ("3B", 3),
        ("1073741824", 2**30),
        ("500MB", 500_000_000),
        ("1kB", 1000),
        ("1.5TB", 1_500_000_000_000),
        ("007MiB", 7 * 2**20),
    ],
)
def test_a_size_is_a_number_and_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 10**6), st.sampled_from(["", "B", "KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB"]))
def test_whole_numbers_of_any_unit_are_read_in_any_case(number: int, unit: str) -> None:
    base = 1024 if "i" in unit else 1000
    power = "BKMGT".index((unit or "B")[0].upper())
    for text in (f"{number}{unit}", f"{number} {unit.upper()}".strip(), f"{number}{unit.lower()}"):
        assert parse_size(text) == number * base**power


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "GiB", "1G", "1M", "1XiB", "-1GiB", "+1", "1e9", "1,5GiB", "1..5MiB", ".5GiB", "1.GiB", "1GiBs",
        "0.3B", "1.0001KiB", "1  GiB", "nan", "inf", "0x10", "1_000", "١GiB", "1\nGiB", "9" * 40,
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="such as 1GiB, 512MiB, 2GB or a number of bytes"):
        parse_size(text)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_of_bytes_takes_sizes_as_text_and_as_numbers(setting: str, tmp_path: Path) -> None:
    assert values_of(make_config({setting: "2GiB"}))[setting] == 2**31
    assert values_of(make_config({setting: 12345}))[setting] == 12345
    file = tmp_path / "config.yaml"
    file.write_text(f"{setting.replace('_', '-')}: 3MiB\n")
    assert values_of(make_config({}, file))[setting] == 3 * 2**20
    for wrong in ("0GiB", "much", "1G"):
        with pytest.raises(ConfigError) as caught:
            make_config({setting: wrong})
        assert caught.value.setting == setting


def test_no_setting_of_bytes_is_left_out() -> None:
    names = {each.name for each in DECLARED if "bytes" in each.name}
    assert names == set(SETTINGS) == {each.name for each in DECLARED if each.declared.unit == "bytes"}


@given(st.integers(0, 10**17))
def test_a_size_is_read_back_from_its_text(size: int) -> None:
    assert parse_size(size_text(size)) == size
    assert parse_size(size_text(size * 2**20)) == size * 2**20
