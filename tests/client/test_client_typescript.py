"""What the TypeScript client's package says, as far as that shows without Node; ``tests/deploy`` runs it."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from manyhats.client import upload

ROOT = Path(__file__).parents[2] / "clients" / "typescript"


def test_it_has_the_version_of_the_project() -> None:
    package = json.loads((ROOT / "package.json").read_text())
    lock = json.loads((ROOT / "package-lock.json").read_text())
    assert (
        package["version"]
        == lock["version"]
        == lock["packages"][""]["version"]
        == metadata.version("manyhats")
    )


def test_its_lockfile_has_digests_and_names_no_registry() -> None:
    lock = json.loads((ROOT / "package-lock.json").read_text())
    packages = {path: each for path, each in lock["packages"].items() if path}
    assert all(each["integrity"].startswith("sha512-") for each in packages.values())
    assert not [path for path, each in packages.items() if "resolved" in each]


@pytest.mark.parametrize("name", ["CONFIG_FILE", "WEIGHTS_SUFFIX", "HEAD_FILES", "TEXT_FILES"])
def test_it_uploads_the_files_that_the_python_client_does(name: str) -> None:
    source = (ROOT / "src" / "upload.ts").read_text()
    found = re.search(rf"^export const {name} = (.*?);$", source, re.MULTILINE | re.DOTALL)
    assert found is not None
    names = re.findall(r'"([^"]+)"', found[1])
    expected = getattr(upload, name)
    assert names == ([expected] if isinstance(expected, str) else list(expected))
