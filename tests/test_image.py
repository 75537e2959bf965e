"""The Dockerfile and its health check; ``tests/deploy/test_image.py`` runs the steps in a clean root."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from manyhats.server.access.errors import ConfigError
from manyhats.server.lifetime.config import SETTINGS, ServeConfig
from manyhats.server.lifetime.config_file import make_config
from manyhats.settings.reading import read_variables
from support.dockerfile import ROOT, Stage, stages
from support.fakes.server import running_server
from support.servers.secure import make_pki, secured_server

HEALTH_CHECK = ROOT / "deploy/image/healthcheck.py"


def image() -> Stage:
    return stages()[-1]


def test_the_image_does_not_serve_other_machines_unless_it_is_told_how_or_not_to_mind() -> None:
    assert image().entry_point == ["manyhats", "serve"]
    known = {each.variable for each in SETTINGS} | {"MANYHATS_HOME"}
    own = {name for name in image().variables if name.startswith("MANYHATS_")}
    assert {"MANYHATS_HOST", "MANYHATS_STORE"} <= own <= known
    settings = read_variables(SETTINGS, image().variables)
    with pytest.raises(ConfigError, match="needs --tls-cert and --tls-key and --token-file; or --insecure"):
        make_config(settings)
    secured = {"tls_cert": "/s/c.pem", "tls_key": "/s/c.key", "token_file": "/s/t.yaml"}
    for more in ({"insecure": True}, secured):
        assert isinstance(make_config({**settings, **more}), ServeConfig)


def test_the_image_writes_to_its_volume_alone() -> None:
    volume = image().last("VOLUME")
    paths = [value for name, value in image().variables.items() if value.startswith("/") and name != "PATH"]
    assert len(paths) == 4
    assert all(path.startswith(f"{volume}/") for path in paths)


def test_the_image_is_not_run_by_root_and_exposes_what_it_listens_on() -> None:
    user, group = image().last("USER").split(":")
    assert min(int(user), int(group)) > 0
    assert image().last("EXPOSE").split() == [str(ServeConfig().grpc_port), str(ServeConfig().http_port)]


def test_what_is_copied_is_there() -> None:
    copied = [rest.split() for stage in stages() for name, rest in stage.instructions if name == "COPY"]
    for *sources, _ in copied:
        assert all((ROOT / source).exists() for source in sources if not source.startswith(("--", "/")))


async def checked(address: str) -> int:
    import asyncio

    port = address.rpartition(":")[2]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HEALTH_CHECK), env={"MANYHATS_HTTP_PORT": port}
    )
    return await process.wait()


async def test_the_health_check_tells_of_readiness_with_and_without_tls(tmp_path: Path) -> None:
    async with running_server() as server:
        assert await checked(server.http) == 0
    async with running_server(is_open=False) as server:
        assert await checked(server.http) == 1
    async with secured_server(tls=make_pki(tmp_path).files) as server:
        assert await checked(server.http) == 0


def test_the_health_check_asks_the_port_that_the_server_has_by_default() -> None:
    assert image().health_check == ["python", "/opt/manyhats/healthcheck.py"]
    assert f'"{ServeConfig().http_port}"' in HEALTH_CHECK.read_text()
    # Nobody listens on the default port of a machine that runs tests, or somebody who is no server of ours.
    assert subprocess.run([sys.executable, HEALTH_CHECK], env={"MANYHATS_HTTP_PORT": "1"}).returncode == 1
