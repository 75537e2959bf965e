"""What a built package says of itself; tests/deploy/test_packages.py builds one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What an index shows has none of the checkout's files beside it.
RELATIVE_LINK = re.compile(r"\]\((?!https?://)")


def test_every_package_says_that_it_has_types() -> None:
    folders = [ROOT / folder for folder in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
    packages = [init.parent for folder in folders for init in folder.glob("*/__init__.py")]
    assert len(packages) == 9
    untyped = [path for path in (ROOT / "clients/manyhats", *packages) if not (path / "py.typed").exists()]
    assert untyped == []


def test_the_readme_on_an_index_has_no_link_that_only_a_checkout_follows() -> None:
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    (fragment,) = hook["fragments"]
    text = (ROOT / fragment["path"]).read_text(encoding="utf-8")
    assert RELATIVE_LINK.search(text)
    for each in hook["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    assert not RELATIVE_LINK.search(text)
    assert "a task's name is the model name (docs/http.md)" in text
    assert ".png" not in text
