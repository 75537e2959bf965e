"""The manifests of deploy/kubernetes agree with the server: settings, ports, probes, times, memory, secrets.

``tests/deploy/test_kubernetes.py`` renders and validates them, which needs programs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from manyhats.engine.config import DEFAULT_KV_CACHE_BYTES
from manyhats.server.lifetime.config import SETTINGS, ServeConfig
from manyhats.server.lifetime.config_file import make_config
from manyhats.server.observability.metrics import Metrics
from manyhats.settings.reading import read_variables
from manyhats.settings.sizes import parse_size
from support.fakes.server import EchoEngine, MemoryStore, make_backend

HOME = Path(__file__).parent.parent / "deploy/kubernetes"
FILES = sorted(HOME.rglob("*.yaml"))
VARIABLES = {each.variable: each for each in SETTINGS}
GIB = 2**30


def read(name: str) -> Any:
    return yaml.safe_load((HOME / name).read_text())


POD = read("base/deployment.yaml")["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def literals(name: str) -> dict[str, str]:
    """The settings that a kustomization gives."""
    (generator,) = read(f"{name}/kustomization.yaml").get("configMapGenerator", [{"literals": []}])
    return dict(each.split("=", 1) for each in generator["literals"])


def config_of(**variables: str) -> ServeConfig:
    given = read_variables(SETTINGS, variables)
    assert given.keys() == {VARIABLES[name].name for name in variables}
    return make_config(given)


def test_every_file_is_yaml_and_used() -> None:
    used = {HOME / "base"}
    for file in HOME.rglob("kustomization.yaml"):
        content = yaml.safe_load(file.read_text())
        paths = content.get("resources", []) + [
            each["path"] for each in content.get("patches", []) if "path" in each
        ]
        used |= {(file.parent / path).resolve() for path in paths} | {file}
    assert set(FILES) <= used


def test_every_variable_is_a_setting_of_the_server() -> None:
    for file in FILES:
        named = set(re.findall(r"MANYHATS_[A-Z_]+", file.read_text()))
        assert named <= {*VARIABLES, "MANYHATS_PORT"}, file


@pytest.mark.parametrize("overlay", ["single", "shared-store"])
def test_the_settings_make_a_server_that_others_may_reach(overlay: str) -> None:
    threads = CONTAINER["resources"]["limits"]["cpu"]
    config = config_of(**literals("base"), **literals(f"overlays/{overlay}"), MANYHATS_NUM_THREADS=threads)
    assert (config.host, config.token_file) == ("0.0.0.0", Path("/etc/manyhats/tokens/tokens.yaml"))
    assert str(config.store).startswith("s3://") == (overlay == "shared-store")
    encrypted = config_of(**{**literals("base"), **literals("components/tls")})
    assert (encrypted.insecure, encrypted.tls_files is not None) == (False, True)


def test_ports_are_those_that_the_server_listens_on() -> None:
    ports = {each["name"]: each["containerPort"] for each in CONTAINER["ports"]}
    assert ports == {"http": ServeConfig().http_port, "grpc": ServeConfig().grpc_port}
    for service in ("service", "service-headless"):
        spec = read(f"base/{service}.yaml")["spec"]
        assert {each["targetPort"]: each["port"] for each in spec["ports"]} == ports
    assert read("overlays/inference-gateway/inferencepool.yaml")["spec"]["targetPorts"] == [
        {"number": ports["http"]}
    ]
    assert {each["port"] for each in read("base/networkpolicy.yaml")["spec"]["ingress"][0]["ports"]} == set(
        ports
    )


def test_probes_ask_what_they_are_for_and_a_first_start_has_ten_minutes() -> None:
    probes = {name: CONTAINER[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}
    assert all(probe["httpGet"]["port"] == "http" for probe in probes.values())
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 600


def test_a_pod_has_time_to_drain() -> None:
    pause = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = config_of(**literals("base")).drain_limit_s
    assert POD["terminationGracePeriodSeconds"] >= pause + drain + 10


def test_a_pod_has_memory_for_what_the_settings_allow() -> None:
    config = config_of(**literals("base"))
    limit = parse_size(CONTAINER["resources"]["limits"]["memory"] + "B")
    cache = config.engine.kv_cache_bytes or DEFAULT_KV_CACHE_BYTES
    assert limit >= cache + config.engine.max_adapter_bytes + 2 * GIB
    assert CONTAINER["resources"]["requests"] == CONTAINER["resources"]["limits"]


def test_a_container_may_do_little() -> None:
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    pod = POD["securityContext"]
    assert (pod["runAsNonRoot"], pod["runAsUser"]) == (True, 10001)
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (POD["automountServiceAccountToken"], POD["enableServiceLinks"]) == (False, False)
    assert {each["name"] for each in CONTAINER["volumeMounts"]} == {each["name"] for each in POD["volumes"]}


def test_files_that_settings_name_are_mounted() -> None:
    mounts = [each["mountPath"] for each in CONTAINER["volumeMounts"]]
    tls = read("components/tls/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    named = [
        value
        for name in ("base", "overlays/single", "components/tls")
        for value in literals(name).values()
        if value.startswith("/")
    ]
    for path in named:
        assert any(path.startswith(f"{mount}/") for mount in (*mounts, tls[0]["mountPath"])), path


def test_the_readme_names_every_overlay_component_and_secret() -> None:
    text = (HOME / "README.md").read_text()
    folders = {f"{path.parent.name}/{path.name}" for path in HOME.glob("*/*") if path.is_dir()}
    assert set(re.findall(r"^\| `([a-z-]+/[a-z-]+)`", text, re.MULTILINE)) == folders
    secrets = re.findall(
        r"(?:secretName|secretRef:\s+name|secretKeyRef:\s+name): (\S+)",
        "\n".join(file.read_text() for file in FILES),
    )
    assert set(secrets) == {"manyhats-tokens", "manyhats-tls", "manyhats-store", "manyhats-object-storage"}
    assert all(f"`{name}`" in text or f"generic {name} " in text for name in secrets)


def test_metrics_that_are_asked_for_exist() -> None:
    all_metrics = Metrics(max_task_labels=1)
    all_metrics.attach(make_backend(EchoEngine(), MemoryStore()))
    metrics = generate_latest(all_metrics.registry).decode()
    (trigger,) = read("components/autoscaling/scaledobject.yaml")["spec"]["triggers"]
    for name in re.findall(r"manyhats_\w+", trigger["metadata"]["query"]):
        assert f"# TYPE {name} gauge" in metrics
    half = ServeConfig().engine.max_num_sequences // 2
    assert int(trigger["metadata"]["threshold"]) == half


def test_nothing_asks_for_a_device_that_is_refused() -> None:
    assert not [file for file in FILES if re.search(r"cuda|nvidia", file.read_text(), re.IGNORECASE)]
