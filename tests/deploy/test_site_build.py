"""The site, built whole with warnings as errors, and looked at in a browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.harnesses.browser import running_browser

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.deploy


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--keep-going",
        "--quiet",
        "docs",
        str(folder),
    ]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_site_has_every_page_and_a_search_that_finds_what_is_generated(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not (site / page).exists()} == set()
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    assert {"reference/grpc", "reference/openapi", "reference/command-line"} <= set(index["docnames"])
    assert {"GenerateStreamResponse", "ChatBody", "manyhats adapters pin"} <= set(index["alltitles"])


def test_the_site_asks_nothing_of_other_hosts(site: Path) -> None:
    asked = re.compile(
        r"""(?:<(?:script|img|link)[^>]*(?:src|href)=["']|@import |url\(["']?)(https?://[^"') ]+)"""
    )
    files = [path for path in site.rglob("*") if path.suffix in {".html", ".css", ".svg"}]
    assert len(files) > 50
    found = {match for path in files for match in asked.findall(path.read_text(encoding="utf-8"))}
    assert found == set()


@pytest.mark.chromium
async def test_no_page_is_wider_than_the_window(site: Path) -> None:
    """Wide tables and code scroll by themselves."""
    files = sorted(site.rglob("*.html"))  # noqa: ASYNC240 - nothing else runs
    async with running_browser() as browser:
        for width in (360, 820, 1100, 1410, 1552):
            page = await browser.new_page(viewport={"width": width, "height": 900})
            for file in files:
                await page.goto(file.as_uri())
                widest = await page.evaluate("document.documentElement.scrollWidth")
                assert widest <= width, f"{file.relative_to(site)} on {width}"
