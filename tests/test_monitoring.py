"""The dashboard and the alerts name what there is; tests/deploy asks a real Prometheus for all of it."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import promql_parser
import pytest
import yaml

import write_dashboard
from manyhats.server.access.tls import ServerTls
from manyhats.v1 import adapter_pb2
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import running_server
from support.harnesses.monitoring import DEPLOY, alerts, board_queries, panels
from support.servers.secure import make_pki

MONITORING = (DEPLOY.parent / "docs/monitoring.md").read_text(encoding="utf-8")
EXPRESSIONS = {**board_queries(), **{name: rule["expr"] for name, rule in alerts().items()}}


def test_the_dashboard_is_what_its_script_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert write_dashboard.main(["--check"]) == 0, "python scripts/write_dashboard.py writes it anew"
    changed = tmp_path / "manyhats.json"
    changed.write_text(write_dashboard.FILE.read_text(encoding="utf-8").replace("p95", "p96"))
    monkeypatch.setattr(write_dashboard, "FILE", changed)
    assert write_dashboard.main(["--check"]) == 1


def test_panels_have_ids_and_places_of_their_own_and_the_datasource_that_is_selected() -> None:
    found = panels()
    assert len({panel["id"] for panel in found}) == len(found)
    places = [panel["gridPos"] for panel in found]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
    sources = [
        each["datasource"]["uid"]
        for panel in found
        if panel["type"] != "row"
        for each in (panel, *panel["targets"])
    ]
    assert set(sources) == {"${datasource}"}
    rows = [panel["title"] for panel in found if panel["type"] == "row"]
    assert rows[:5] == ["Overview", "Latency", "Tasks", "Adapters", "Engine"]


def asked(expr: str) -> dict[str, set[str]]:
    """Names of the series that an expression asks for, each with the labels that it is selected or grouped by."""
    names: list[str] = []
    labels: set[str] = set()

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            names.append(node.name)
            labels.update(matcher.name for matcher in node.matchers.matchers)
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            labels.update(node.modifier.labels)

    promql_parser.walk(promql_parser.parse(expr), visit)
    assert names
    return {name: labels - {"job", "instance"} for name in names}


async def test_every_expression_parses_and_asks_for_series_and_labels_that_there_are(tmp_path: Path) -> None:
    there: defaultdict[str, set[str]] = defaultdict(set)
    async with running_server() as server:
        server.metrics.attach_files(ServerTls(make_pki(tmp_path).files), None)
        await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id="sql", uri="a"))
        await server.generation.Generate(pb.GenerateRequest(task_id="sql", text="abc"))
        server.metrics.adapter_loaded(0.1)
        for metric in server.metrics.registry.collect():
            for sample in metric.samples:
                there[sample.name].update(sample.labels)
    there["up"] = set()
    for title, expr in EXPRESSIONS.items():
        wanted = asked(expr)
        assert wanted.keys() <= there.keys(), title
        assert set.union(*wanted.values()) <= set.union(*(there[name] for name in wanted)), title


def test_every_alert_is_tested_and_explained() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus/rules_test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    rests = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    explained = set(re.findall(r"^\| `(Manyhats\w+)` \|", MONITORING, re.MULTILINE))
    assert fires == rests == explained == alerts().keys()
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert rule["annotations"]["summary"]


def test_gateways_names_are_dropped_and_the_rules_are_found() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    assert all((DEPLOY / "prometheus" / name).exists() for name in config["rule_files"])
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "manyhats"  # the alert on what does not answer asks for it
    (dropped,) = job["metric_relabel_configs"]
    assert dropped["action"] == "drop"
    assert re.fullmatch(dropped["regex"], "vllm:lora_requests_info")
    assert not re.fullmatch(dropped["regex"], "manyhats_ready")
