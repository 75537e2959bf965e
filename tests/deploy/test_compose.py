"""What compose.yaml makes of Envoy's configuration, as Envoy itself reads it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support.compose import envoy_script
from support.servers.replicas import program

pytestmark = pytest.mark.deploy


def test_envoy_takes_the_configuration_that_its_container_writes(tmp_path: Path) -> None:
    script = envoy_script(tmp_path).replace("exec envoy", f"exec {program()} --mode validate")
    checked = subprocess.run(["/bin/sh", "-ec", script], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    assert "OK" in checked.stdout + checked.stderr
