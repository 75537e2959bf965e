"""Settings as text: nothing secret is shown, whatever stands in it comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.server.lifetime.config import SETTINGS
from manyhats.server.lifetime.config_file import make_config
from manyhats.settings.declaration import values_of
from manyhats.settings.printing import config_text


def printed(**given: object) -> str:
    return config_text(SETTINGS, values_of(make_config(given)), dict.fromkeys(given, "file.yaml"))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"catalogue": "postgresql://me:pa:ss@host/db"}, "postgresql://me:***@host/db"),
        (
            {"catalogue": "postgresql://me@host/db?password=pa:ss&x=1"},
            "postgresql://me@host/db?password=***&x=1",
        ),
        ({"catalogue": "postgresql://:pa:ss@host/db"}, "postgresql://:***@host/db"),
        ({"store": "s3://key:pa:ss@bucket/x"}, "s3://key:***@bucket/x"),
        ({"adapter_url_prefixes": ["https://me:pa:ss@host/"]}, "https://me:***@host/"),
        (
            {"register": {"a": "https://h/x?X-Amz-Signature=pa:ss"}},
            "https://h/x?X-Amz-Signature=***",
        ),
    ],
)
def test_passwords_and_keys_in_urls_are_left_out_and_the_comment_says_so(
    given: dict[str, object], shown: str
) -> None:
    text = printed(**given)
    assert shown in text
    assert "pa:ss" not in text
    (line,) = (line for line in text.splitlines() if "***" in line)
    assert line.endswith("  # file.yaml; secrets in it are left out")


def test_what_is_no_secret_stays() -> None:
    for url in (
        "postgresql+psycopg://host:5432/db",
        "postgresql://me@host/db?connect_timeout=3",
        "sqlite:////a@b",
    ):
        assert f"catalogue: {url}  # file.yaml\n" in printed(catalogue=url)


def test_sizes_and_sources_are_written_for_people() -> None:
    lines = printed(kv_cache_bytes=8 * 2**30, adapter_roots=[Path("/a"), Path("/b")]).splitlines()
    assert "kv_cache_bytes: 8GiB  # file.yaml" in lines
    assert "adapter_roots: [/a, /b]  # file.yaml" in lines
    assert "max_sequences: 64  # default" in lines


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1))
def test_any_text_comes_back(text: str) -> None:
    assert yaml.safe_load(printed(model=text))["model"] == text
