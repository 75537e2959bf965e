"""What the page looks like, as docs/ shows it: ``--screenshots`` writes the pictures there."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.async_api import Browser, expect

from manyhats.adapters.artifact import AdapterMethod, AdapterState
from support.fakes.saying import SayingEngine
from support.fakes.server import Running, make_record, running_server
from support.harnesses.browser import visiting

pytestmark = [pytest.mark.chromium, pytest.mark.asyncio(loop_scope="session")]

DOCS = Path(__file__).parents[3] / "docs"
MAX_BYTES = 100_000
QUESTION = "Which of our customers in Lisbon ordered more than three times this year?"
TEXTS = {
    "": "To find these customers, count the orders that each of them placed since January, keep those with more than"
    " three, and look up which of them live in Lisbon. If you share the layout of your tables, I can help you to write"
    " the query. Shall we assume that there is a table of customers and one of orders?",
    "sql": "SELECT customers.name, COUNT(*) AS orders\nFROM customers\n"
    "JOIN orders ON orders.customer_id = customers.id\n"
    "WHERE customers.city = 'Lisbon'\n  AND orders.placed >= '2026-01-01'\nGROUP BY customers.id\nHAVING COUNT(*) > 3;",
    "pirate": "Arr, ye be askin' after them Lisbon folk with more than three hauls in their hold since the new year!"
    " Count their orders, matey, keep them that top three, and strike the rest from yer ledger.",
}


def fill(server: Running) -> None:
    """Tasks of several methods, some loaded, one with an older version."""
    rows: list[tuple[str, int, AdapterMethod, dict[str, str]]] = [
        ("contact-json", 1, AdapterMethod.IA3, {"default.temperature": "0", "default.max_tokens": "96"}),
        ("pirate", 1, AdapterMethod.LORA, {"owner": "docs"}),
        (
            "sentiment",
            2,
            AdapterMethod.PROMPT_TUNING,
            {"default.temperature": "0", "default.max_tokens": "4"},
        ),
        ("sql", 3, AdapterMethod.LORA, {"default.temperature": "0", "default.stop.0": ";"}),
        ("topic", 1, AdapterMethod.P_TUNING, {"default.temperature": "0"}),
    ]
    for task_id, newest, method, labels in rows:
        versions: list[Any] = [
            replace(
                make_record(task_id, version, f"{task_id}-{version}", labels=labels),
                method=method,
                state=AdapterState.ACTIVE if version == newest else AdapterState.INACTIVE,
            )
            for version in range(1, newest + 1)
        ]
        server.store.tasks[task_id] = versions
        server.metrics.task_changed(task_id, versions)
        server.engine.resident[versions[-1].digest] = versions[-1]
    server.engine.without_slot.add("sha256:contact-json-1")
    server.engine.forget_adapter("sha256:topic-1")
    counts = {"sql": 1843, "sentiment": 9210, "pirate": 12, "contact-json": 640}
    for task_id, count in counts.items():
        for _ in range(count):
            server.metrics.call_finished("GenerateStream", task_id, "OK", None)
    for result, reason in [("created", "")] * 9 + [("existing", "")] * 2 + [("refused", "BASE_MISMATCH")]:
        server.metrics.registration(result, reason)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("size", "width"), [("wide", 1200), ("narrow", 390)])
async def test_the_page_is_as_documented(
    browser: Browser, request: pytest.FixtureRequest, tmp_path: Path, scheme: Any, size: str, width: int
) -> None:
    name = f"page-{size}-{scheme}.png"
    file = (DOCS if request.config.getoption("--screenshots") else tmp_path) / name
    engine = SayingEngine(texts=TEXTS, step_s=0.07)
    async with running_server(engine=engine, base="smollm2-135m-instruct") as server:
        engine.on_step = server.metrics.step
        fill(server)
        async with visiting(browser, server.http, width=width, height=844, color_scheme=scheme) as page:
            await expect(page.locator("#tasks tbody")).to_have_count(5)
            await page.get_by_label("Leave out contact-json").click()
            await page.get_by_label("Add a task or a version to ask").fill("sql")
            await page.keyboard.press("Enter")
            await page.get_by_label("Prompt").fill(QUESTION)
            if file.parent == DOCS:  # a past to draw a line of
                for pause_s in (7, 5, 9):
                    await page.locator("#run").click()
                    await asyncio.sleep(pause_s)
            await page.locator("#run").click()
            # As it is answered: figures of two readings, and the text of the shortest answer nearly whole.
            await expect(page.locator("#live-rate")).not_to_have_text("0")
            await expect(page.locator("#answers article").nth(2)).to_have_attribute("data-state", "done")
            await page.locator("#prompt").blur()
            await page.screenshot(path=file, full_page=size == "wide", animations="disabled", scale="css")
    Image.open(file).quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
    assert file.stat().st_size < MAX_BYTES
