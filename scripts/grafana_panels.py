"""Panels of a Grafana dashboard as data, and the JSON that Grafana reads of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DATASOURCE: Mapping[str, str] = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH = 24  # of a dashboard, in Grafana's units


@dataclass(frozen=True)
class Query:
    """What is asked of Prometheus, and how each of its series is called."""

    expr: str
    legend: str = "__auto"
    is_instant: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture.

    Attributes:
        title, description: for its readers.
        queries: what it shows.
        kind: Grafana's name for the sort of picture.
        unit: Grafana's name for the unit of its values.
        width, height: in Grafana's units; a dashboard is 24 wide.
        fields: further settings of its values. options: of the picture.
    """

    title: str
    queries: Sequence[Query]
    description: str = ""
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 8
    fields: Mapping[str, Any] | None = None
    options: Mapping[str, Any] | None = None

    def as_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """The panel at a place; ``number`` is its id."""
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {
                "defaults": {"unit": self.unit, "min": 0, **(self.fields or {})},
                "overrides": [],
            },
            "options": {**_OPTIONS.get(self.kind, {}), **(self.options or {})},
            "targets": [
                {
                    "refId": chr(ord("A") + index),
                    "datasource": DATASOURCE,
                    "expr": query.expr,
                    "legendFormat": query.legend,
                    "format": "heatmap" if self.kind == "heatmap" else "time_series",
                    "instant": query.is_instant,
                    "range": not query.is_instant,
                }
                for index, query in enumerate(self.queries)
            ],
        }


_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name", "colorMode": "value"},
    "bargauge": {
        "reduceOptions": {"calcs": ["lastNotNull"]},
        "orientation": "horizontal",
        "displayMode": "basic",
    },
    "heatmap": {"calculate": False, "yAxis": {"unit": "s"}, "color": {"mode": "scheme", "scheme": "Oranges"}},
}


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Variable:
    """A choice that its readers have: some values of a label, or a source of data."""

    name: str
    label: str
    query: str
    is_datasource: bool = False

    def as_json(self) -> dict[str, Any]:
        """The variable."""
        named = {"name": self.name, "label": self.label}
        if self.is_datasource:
            return {**named, "type": "datasource", "query": self.query}
        return {
            **named,
            "type": "query",
            "datasource": DATASOURCE,
            "definition": self.query,
            "query": {"query": self.query, "refId": self.name},
            "refresh": 2,  # as the range of time changes
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        }


def dashboard(uid: str, title: str, variables: Sequence[Variable], rows: Sequence[Row]) -> str:
    """The JSON of a dashboard."""
    content = {
        "uid": uid,
        "title": title,
        "tags": [uid],
        "editable": True,
        "schemaVersion": 39,
        "version": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,  # one time is marked in all panels
        "templating": {"list": [each.as_json() for each in variables]},
        "annotations": {"list": []},
        "links": [],
        "panels": list(_placed(rows)),
    }
    return json.dumps(content, indent=2) + "\n"


def _placed(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Rows from top to bottom, their panels from left to right."""
    number, y = 1, 0
    for row in rows:
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1},
        }
        number, y, x, height = number + 1, y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > _WIDTH:
                x, y, height = 0, y + height, 0
            yield panel.as_json(number, x, y)
            number, x, height = number + 1, x + panel.width, max(height, panel.height)
        y += height
