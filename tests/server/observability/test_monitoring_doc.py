"""docs/monitoring.md lists every metric, as it is."""

from __future__ import annotations

import re
from pathlib import Path

from manyhats.server.access.tls import ServerTls
from manyhats.v1 import adapter_pb2
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import Running, running_server
from support.servers.secure import make_pki

PAGE = Path(__file__).parents[3] / "docs/monitoring.md"
ROW = re.compile(r"^\| `(manyhats_\w+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)


def listed() -> dict[str, tuple[str, frozenset[str]]]:
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    found = {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(found) == len(rows), "a metric is listed twice"
    return found


async def use(server: Running) -> None:
    """Let every metric have a series."""
    await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id="sql", uri="a"))
    await server.generation.Generate(pb.GenerateRequest(task_id="sql", text="abc"))
    server.metrics.adapter_loaded(0.1)


async def test_the_page_lists_every_metric_with_its_type_and_labels(tmp_path: Path) -> None:
    async with running_server() as server:
        server.metrics.attach_files(ServerTls(make_pki(tmp_path).files), None)
        await use(server)
        families = list(server.metrics.registry.collect())
    wanted = listed()
    shown = {}
    for family in families:
        if family.name.startswith("manyhats_"):
            suffix = "_total" if family.type == "counter" else ""
            labels = [frozenset(sample.labels) - {"le"} for sample in family.samples]
            name = family.name + suffix
            shown[name] = (family.type, labels[0] if labels else wanted[name][1])
    assert shown.keys() == wanted.keys()
    assert {name: shown[name] for name in shown} == wanted
