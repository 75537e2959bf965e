"""What the doctor says of Python and packages, by the installed metadata."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from manyhats.server.doctor.packages import look_at_packages, look_at_python
from support.harnesses.doctor import only

METADATA = """\
Metadata-Version: 2.4
Name: manyhats
Version: 9
Requires-Python: >={python}
Provides-Extra: server
Provides-Extra: s3
Requires-Dist: typer>=0.1
Requires-Dist: a-package-nobody-has>=1; extra == "server"
Requires-Dist: numpy>=999.1; extra == "server"
Requires-Dist: moto[s3]>=0.0.1; extra == 's3'
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation of manyhats with other requirements, found first."""
    directory = tmp_path / "manyhats-9.dist-info"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    return directory / "METADATA"


def test_this_installation_is_whole() -> None:
    assert only(look_at_python()).condition.value == "ok"
    for extra in ("server", "s3", "postgres"):
        assert only(look_at_packages(extra)).condition.value == "ok"


def test_missing_and_old_packages_fail_by_name(installed: Path) -> None:
    installed.write_text(METADATA.format(python="3.11"))
    finding = only(look_at_packages("server"))
    assert (finding.subject, finding.condition.value) == ("packages of manyhats[server]", "failure")
    assert finding.text.startswith("missing: a-package-nobody-has; too old: numpy ")
    assert finding.text.endswith("(needs 999.1)")
    assert "manyhats[server]" in finding.advice
    assert only(look_at_packages("s3")).text == "all 2 are there"
    unknown = only(look_at_packages("otel"))
    assert (unknown.condition.value, "too old" in unknown.text) == ("failure", True)


def test_a_python_that_is_too_old_fails(installed: Path) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor + 1}"
    installed.write_text(METADATA.format(python=version))
    finding = only(look_at_python())
    assert finding.condition.value == "failure"
    assert version in finding.advice
