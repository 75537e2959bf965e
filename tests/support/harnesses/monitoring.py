"""What the dashboard and the alerts ask of Prometheus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[3] / "deploy"
DASHBOARD = DEPLOY / "grafana/manyhats.json"
RULES = DEPLOY / "prometheus/rules.yml"


def panels() -> list[dict[str, Any]]:
    """The dashboard's, rows and all."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found


def board_queries() -> dict[str, str]:
    """Expressions by panel and letter, as Grafana sends them with everything selected."""
    return {
        f"{panel['title']} {target['refId']}": selected(target["expr"])
        for panel in panels()
        for target in panel.get("targets", ())
    }


def selected(expr: str) -> str:
    """An expression with its variables replaced by what stands for everything."""
    for name, value in (("$instance", ".*"), ("$task", ".*"), ("$__rate_interval", "20s")):
        expr = expr.replace(name, value)
    assert "$" not in expr, f"an unknown variable: {expr}"
    return expr


def alerts() -> dict[str, dict[str, Any]]:
    """Rules by name."""
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    found = {rule["alert"]: rule for rule in group["rules"]}
    assert len(found) == len(group["rules"]), "an alert is there twice"
    return found
