"""deploy/kubernetes as kubectl renders it, validated strictly by the schemas of Kubernetes, and of others by ours."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

kubernetes_validate: Any = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
pytestmark = pytest.mark.deploy

HOME = Path(__file__).parents[2] / "deploy/kubernetes"
PROGRAMS = Path(sysconfig.get_path("scripts"))
# The oldest that has what the files use, and the newest that there are schemas for.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
OVERLAYS = sorted(path.name for path in (HOME / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (HOME / "components").iterdir())
SETS = [each for count in range(len(COMPONENTS) + 1) for each in combinations(COMPONENTS, count)]

Documents = list[dict[str, Any]]


def of(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these properties and no others."""
    properties = {**required, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
NUMBER: dict[str, Any] = {"type": "integer", "minimum": 1}
LABELS: dict[str, Any] = {"type": "object", "additionalProperties": TEXT, "minProperties": 1}
METADATA = of({"name": TEXT}, {"labels": LABELS, "namespace": TEXT})


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


PICKER = of(
    {"name": TEXT}, {"port": of({"number": NUMBER}), "failureMode": {"enum": ["FailOpen", "FailClose"]}}
)
PATH = of({"type": {"enum": ["PathPrefix", "Exact"]}, "value": TEXT})
ROUTED = of({"name": TEXT}, {"group": TEXT, "kind": TEXT, "port": NUMBER})
RULE = of(
    {"backendRefs": listed(ROUTED)},
    {
        "matches": listed(of({"path": PATH})),
        "timeouts": of({}, {"request": {"pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}}),
    },
)
SCRAPED = of(
    {"port": TEXT},
    {
        "path": TEXT,
        "interval": {"pattern": r"^[0-9]+(s|m)$"},
        "scheme": {"enum": ["HTTP", "HTTPS"]},
        "tlsConfig": {"type": "object"},
        "metricRelabelings": listed(
            of({"action": {"enum": ["drop", "keep"]}}, {"sourceLabels": listed(TEXT), "regex": TEXT})
        ),
    },
)
ASKED = of({"serverAddress": TEXT, "query": TEXT, "threshold": {"pattern": r"^\d+$"}})
# What is used of custom resources' specs, as their makers document them.
CUSTOM: dict[str, dict[str, Any]] = {
    "inference.networking.k8s.io/v1 InferencePool": of(
        {
            "selector": of({"matchLabels": LABELS}),
            "targetPorts": listed(of({"number": NUMBER})),
            "endpointPickerRef": PICKER,
        },
        {"appProtocol": {"enum": ["http", "kubernetes.io/h2c"]}},
    ),
    "gateway.networking.k8s.io/v1 HTTPRoute": of(
        {"parentRefs": listed(of({"name": TEXT}, {"group": TEXT, "kind": TEXT})), "rules": listed(RULE)}
    ),
    "monitoring.coreos.com/v1 PodMonitor": of(
        {
            "jobLabel": TEXT,
            "selector": of({"matchLabels": LABELS}),
            "podMetricsEndpoints": listed(SCRAPED),
        }
    ),
    "keda.sh/v1alpha1 ScaledObject": of(
        {
            "scaleTargetRef": of({"name": TEXT}),
            "triggers": listed(of({"type": {"const": "prometheus"}, "metadata": ASKED})),
        },
        dict.fromkeys(("minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod"), NUMBER),
    ),
}


def render(directory: Path) -> Documents:
    command = [PROGRAMS / "kubectl", "kustomize", directory]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (shown.returncode, shown.stderr) == (0, "")
    return list(yaml.safe_load_all(shown.stdout))


def rendered_with(overlay: str, components: tuple[str, ...], directory: Path) -> Documents:
    """An operator's own overlay."""
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "manyhats",
        "resources": [os.path.relpath(HOME / "overlays" / overlay, directory)],
        "components": [os.path.relpath(HOME / "components" / name, directory) for name in components],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return render(directory)


def validate(document: dict[str, Any]) -> None:
    kind = f"{document['apiVersion']} {document['kind']}"
    if kind in CUSTOM:
        schema = of({"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA, "spec": CUSTOM[kind]})
        jsonschema.validate(document, schema)
        return
    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("components", SETS, ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_with_any_components_is_valid(
    overlay: str, components: tuple[str, ...], tmp_path: Path
) -> None:
    documents = rendered_with(overlay, components, tmp_path)
    for document in documents:
        validate(document)
    kinds = [document["kind"] for document in documents]
    assert kinds.count("Deployment") == kinds.count("NetworkPolicy") == 1
    assert ("PodMonitor" in kinds) == ("monitoring" in components)
    assert ("InferencePool" in kinds) == (overlay == "inference-gateway")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_select_the_pods_and_what_a_pod_names_is_there(overlay: str, tmp_path: Path) -> None:
    documents = rendered_with(overlay, ("monitoring",), tmp_path)
    by_kind = {document["kind"]: document for document in documents}
    template = by_kind["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"].items()
    for kind, spec in ((document["kind"], document.get("spec", {})) for document in documents):
        selector = spec.get("podSelector" if kind == "NetworkPolicy" else "selector")
        if selector is not None:
            assert selector.get("matchLabels", selector).items() <= labels, kind
    callers = by_kind["NetworkPolicy"]["spec"]["ingress"][0]["from"]
    assert [list(each.values()) for each in callers] == 2 * [[{"matchLabels": {"manyhats-access": "true"}}]]
    (container,) = template["spec"]["containers"]
    assert container["envFrom"][0]["configMapRef"]["name"] == by_kind["ConfigMap"]["metadata"]["name"]
    assert container["image"] == "registry.example.org/manyhats:0.1.0"


def test_one_server_has_one_volume_and_several_have_none() -> None:
    single = {each["kind"]: each for each in render(HOME / "overlays/single")}
    spec = single["Deployment"]["spec"]
    assert spec["strategy"] == {"type": "Recreate"}
    home = next(each for each in spec["template"]["spec"]["volumes"] if each["name"] == "home")
    claim = single["PersistentVolumeClaim"]["metadata"]["name"]
    assert home == {"name": "home", "persistentVolumeClaim": {"claimName": claim}}
    shared = {each["kind"]: each for each in render(HOME / "overlays/shared-store")}
    assert shared["Deployment"]["spec"]["replicas"] > 1
    assert shared["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert "PersistentVolumeClaim" not in shared


def test_with_tls_everything_speaks_it(tmp_path: Path) -> None:
    documents = rendered_with("shared-store", ("monitoring", "tls"), tmp_path)
    by_kind = {document["kind"]: document for document in documents}
    settings = by_kind["ConfigMap"]["data"]
    assert settings["MANYHATS_INSECURE"] == "false"
    assert settings["MANYHATS_TLS_CERT"] == "/etc/manyhats/tls/tls.crt"
    (container,) = by_kind["Deployment"]["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert (asked["scheme"], asked["port"]) == ("HTTPS", "http")
    for service in (each for each in documents if each["kind"] == "Service"):
        assert [each.get("appProtocol") for each in service["spec"]["ports"]] == ["https", None]
    assert by_kind["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["scheme"] == "HTTPS"


def test_a_field_that_nobody_knows_is_refused() -> None:
    documents = [each for each in render(HOME / "overlays/inference-gateway") if "spec" in each]
    assert len(documents) > 5
    for document in documents:
        document["spec"]["nonsense"] = 1
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            validate(document)


def test_the_files_are_tidy() -> None:
    checked = subprocess.run(
        [PROGRAMS / "yamllint", "--strict", "."], cwd=HOME, capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout
