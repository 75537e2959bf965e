"""Environments of the suites: in ``.conformance``, apart from the project's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from benchmarks import environments

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1] / ".conformance"


def python_of(name: str) -> Path:
    """The interpreter of an environment with the packages of ``requirements/NAME.txt``.

    Raises:
        UnavailableError: they cannot be installed.
    """
    return environments.python_of(ROOT / name, HERE / "requirements" / f"{name}.txt")


def node_of(name: str) -> Path:
    """A directory with the suite ``suites/NAME`` and its packages from npm.

    Raises:
        UnavailableError: there is no node, or they cannot be installed.
    """
    source, directory = HERE / "suites" / name, ROOT / name
    environments.need_programs(name, "node", "npm")
    shutil.copytree(source, directory, dirs_exist_ok=True)
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(directory)]
    environments.make_once(
        directory, (source / "package.json").read_text(), lambda: environments.run_step(name, install)
    )
    return directory


def offline(**variables: str) -> Mapping[str, str]:
    """The environment of a suite's processes: nothing is asked of a hub, nothing is reported to anyone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MANYHATS_"))}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(ROOT / "hub"),
        "LANGSMITH_TRACING": "false",
        "OPENAI_API_KEY": "none",
        **variables,
    }
