"""compose.yaml as each way to run it reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from manyhats.server.lifetime.config import SETTINGS, ServeConfig
from manyhats.server.lifetime.config_file import make_config
from manyhats.settings.reading import read_variables
from support.dockerfile import ROOT, stages

ENVIRONMENTS = {"single": "", "shared": (ROOT / "deploy/compose/shared.env").read_text()}
SERVERS = ("manyhats", "manyhats-2")
_DEFAULTED = re.compile(r"\$\{([A-Z_]+):-([^}]*)\}")


def compose(kind: str) -> dict[str, Any]:
    """The file with its variables replaced, and only the services of that way to run it."""
    lines = [line for line in ENVIRONMENTS[kind].splitlines() if line and not line.startswith("#")]
    given = dict(line.split("=", 1) for line in lines)
    text = _DEFAULTED.sub(lambda match: given.get(match[1]) or match[2], (ROOT / "compose.yaml").read_text())
    content: dict[str, Any] = yaml.safe_load(text)
    profiles = set(given.get("COMPOSE_PROFILES", "").split(","))
    services = content["services"]
    content["services"] = {
        name: each for name, each in services.items() if profiles & set(each.get("profiles", profiles))
    }
    return content


def services(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = compose(kind)["services"]
    return found


def config(kind: str, server: str = SERVERS[0]) -> ServeConfig:
    """The settings of a server: the image's, and what is given here."""
    own = {**stages()[-1].variables, **services(kind)[server]["environment"]}
    return make_config(read_variables(SETTINGS, own))


def envoy_script(directory: Path) -> str:
    """What Envoy's container runs, on this machine's file and with a directory in place of its /tmp."""
    service = services("shared")["envoy"]
    assert service["entrypoint"] == ["/bin/sh", "-ec"]
    ((source, target),) = (mount.split(":")[:2] for mount in service["volumes"])
    script: str = service["command"][0]
    # In one go: the repository may be in a directory of /tmp.
    places = {target: str(ROOT / source), "/tmp/": f"{directory}/"}
    return re.sub("|".join(map(re.escape, places)), lambda match: places[match[0]], script)
