"""The page in a browser: what it shows, what it does, and what hostile texts cannot make it do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, Route, expect

from manyhats.adapters.registration import Registration, Uri
from manyhats.engine.errors import FieldInvalidError, QueueFullError
from manyhats.server.access.tokens import Role
from manyhats.server.service.registrations import Registrations
from support.fakes.server import Running, eventually, make_backend, make_record, running_server
from support.harnesses.browser import visiting
from support.servers.secure import add_token, secured_server

pytestmark = [pytest.mark.chromium, pytest.mark.asyncio(loop_scope="session")]

EVIL = "<img src=x onerror=window.ran=1>"


async def register(server: Running, task_id: str, uri: str = "a", **options: Any) -> None:
    registrations = Registrations(make_backend(server.engine, server.store), server.metrics)
    await registrations.register(Registration(task_id, Uri(uri), **options))


def answer(page: Page, name: str) -> Any:
    return page.locator("#answers article").filter(has=page.get_by_role("heading", name=name, exact=True))


def row(page: Page, task_id: str) -> Any:
    return page.locator("#tasks tr.main-row").filter(has=page.locator(f".task:text-is('{task_id}')"))


async def ask(page: Page, prompt: str) -> None:
    await page.get_by_label("Prompt").fill(prompt)
    await page.locator("#run").click()


# Asking.


async def test_two_tasks_answer_side_by_side(browser: Browser) -> None:
    async with running_server() as server:
        await register(server, "sql")
        await register(server, "sentiment", "b")
        server.engine.step_s = 0.03
        async with visiting(browser, server.http) as page:
            await page.get_by_label("Leave out echo").click()
            await page.get_by_label("Plain text").check()
            await page.get_by_label("Tokens at most").fill("60")
            await page.get_by_label("Temperature").fill("0.5")
            await ask(page, "How many customers live in Lisbon? Count them all.")
            both = page.locator("#answers article[data-state=running]")
            await expect(both).to_have_count(2)
            boxes = [await both.nth(index).bounding_box() for index in range(2)]
            assert boxes[0]["y"] == boxes[1]["y"]  # type: ignore[index]
            await eventually(lambda: server.engine.running == 2)
            for name in ("sql", "sentiment"):
                card = answer(page, name)
                await expect(card).to_have_attribute("data-state", "done")
                await expect(card.locator(".text")).to_have_text(
                    "How many customers live in Lisbon? Count them all."
                )
                await expect(card.locator(".figures")).to_contain_text("tokens/s")
                await expect(card.locator(".badge")).to_have_text("v1")
            await expect(page.locator("#said")).to_contain_text("has answered")
            await expect(row(page, "sql").locator("[data-requests]")).to_have_text("1")
    asked = {request.adapter.name: request for request in server.engine.requests if request.adapter}
    assert asked.keys() == {"sql@1", "sentiment@1"}
    assert all(request.sampling.temperature == 0.5 for request in asked.values())
    assert all(request.stopping.max_new_tokens == 60 for request in asked.values())


async def test_fields_left_empty_are_left_to_the_task(browser: Browser) -> None:
    async with running_server() as server:
        await register(server, "sql", labels={"default.temperature": "0.25"})
        async with visiting(browser, server.http) as page:
            await ask(page, "hello")
            await expect(answer(page, "sql")).to_have_attribute("data-state", "done")
            await page.get_by_label("Temperature").fill("")
            await ask(page, "hello")
            await expect(answer(page, "sql")).to_have_attribute("data-state", "done")
            await eventually(lambda: len(server.engine.requests) == 4)
    temperatures = [(str(each.adapter), each.sampling.temperature) for each in server.engine.requests]
    assert sorted(value for name, value in temperatures if name == "None") == [0.0, 1.0]
    assert sorted(value for name, value in temperatures if name != "None") == [0.0, 0.25]


async def test_a_version_is_asked_by_its_name(browser: Browser) -> None:
    async with running_server() as server:
        await register(server, "sql", "a")
        await register(server, "sql", "b")
        async with visiting(browser, server.http) as page:
            await page.get_by_label("Add a task or a version to ask").fill("sql@1")
            await page.keyboard.press("Enter")
            await ask(page, "hello")
            await expect(answer(page, "sql@1").locator(".badge")).to_have_text("v1")
            await expect(answer(page, "sql").locator(".badge")).to_have_text("v2")


async def test_what_is_typed_before_the_tasks_are_known_does_not_replace_them(browser: Browser) -> None:
    async with running_server() as server:
        await register(server, "sql", "a")
        await register(server, "sql", "b")
        async with visiting(browser, server.http) as page:
            released = asyncio.Event()

            async def late(route: Route) -> None:
                await released.wait()
                await route.continue_()

            await page.route("**/v1/tasks?*", late)
            await page.reload()
            add = page.get_by_label("Add a task or a version to ask")
            await page.get_by_label("Prompt").fill("hello")
            await expect(add).to_be_disabled()
            await expect(page.locator("#run")).to_be_disabled()
            released.set()
            await add.fill("sql@1")
            await page.keyboard.press("Enter")
            await expect(page.locator("#chosen li > span")).to_have_text(["echo", "sql", "sql@1"])
            await page.locator("#run").click()
            await expect(answer(page, "sql").locator(".badge")).to_have_text("v2")


async def test_stop_ends_the_row_in_the_engine(browser: Browser) -> None:
    async with running_server() as server:
        server.engine.step_s = 0.05
        async with visiting(browser, server.http) as page:
            await ask(page, "x" * 900)
            await expect(answer(page, "echo")).to_have_attribute("data-state", "running")
            await eventually(lambda: server.engine.running == 1)
            await expect(answer(page, "echo").locator(".text")).not_to_be_empty()
            await page.get_by_label("Stop echo").click()
            await expect(answer(page, "echo")).to_have_attribute("data-state", "stopped")
            await eventually(lambda: server.engine.running == 0)
            await expect(answer(page, "echo").locator(".text")).not_to_be_empty()


# Hostile texts.


async def test_hostile_texts_are_shown_and_not_run(browser: Browser) -> None:
    async with running_server() as server:
        await register(server, "sql", labels={"note": EVIL, "default.stop.0": EVIL})
        async with visiting(browser, server.http) as page:
            await expect(row(page, "sql")).to_contain_text(EVIL)
            await ask(page, EVIL)
            await expect(answer(page, "echo").locator(".text")).to_have_text(f"user:{EVIL};")
            server.engine.error = FieldInvalidError("prompt", EVIL)
            await ask(page, "again")
            await expect(answer(page, "echo").locator(".figures")).to_contain_text(EVIL)
            await page.get_by_label("Add a task or a version to ask").fill(EVIL)
            await page.keyboard.press("Enter")
            await ask(page, "again")
            await expect(answer(page, EVIL)).to_have_attribute("data-state", "failed")
            assert await page.locator("img[src=x]").count() == 0
            assert await page.evaluate("window.ran") is None


# What goes wrong.


async def test_a_token_is_asked_for_and_never_in_an_address(browser: Browser, tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens", "ops")
    async with secured_server(token_file=tmp_path / "tokens") as server:
        server.store.tasks["sql"] = [make_record("sql")]
        async with visiting(browser, server.http) as page:
            seen: list[str] = []
            page.on("request", lambda request: seen.append(request.url))
            dialog = page.get_by_role("dialog", name="This server needs a token")
            await expect(dialog).to_be_visible()
            await page.keyboard.press("Escape")
            await expect(page.locator("#tasks-state")).to_contain_text("have a token")
            await page.get_by_role("button", name="Enter a token").click()
            await page.get_by_label("Token", exact=True).fill("mh_wrong")
            await page.keyboard.press("Enter")
            await expect(dialog.get_by_role("alert")).to_contain_text("unknown")
            await page.get_by_label("Token", exact=True).fill(token)
            await page.keyboard.press("Enter")
            await expect(row(page, "sql")).to_be_visible()
            await expect(page.locator("#caller")).to_have_text("ops: may ask, may manage")
            await page.reload()
            await expect(row(page, "sql")).to_be_visible()
            await expect(dialog).not_to_be_visible()
            assert seen
            assert not [url for url in seen if token in url]
            assert await page.evaluate("localStorage.length + document.cookie.length") == 0


@pytest.mark.parametrize("role", Role)
async def test_a_token_without_a_role_is_offered_nothing_that_needs_it(
    browser: Browser, tmp_path: Path, role: Role
) -> None:
    token = add_token(tmp_path / "tokens", "ci", (role,), ("sql",))
    async with secured_server(token_file=tmp_path / "tokens") as server:
        server.store.tasks.update({"sql": [make_record("sql")], "other": [make_record("other")]})
        async with visiting(browser, server.http) as page:
            await page.get_by_label("Token", exact=True).fill(token)
            await page.keyboard.press("Enter")
            await expect(row(page, "sql")).to_be_visible()
            await expect(row(page, "other")).to_have_count(0)
            manages = role is Role.MANAGE
            for text in ("Delete", "Upload an adapter"):
                await expect(page.get_by_role("button", name=text)).to_have_count(1 if manages else 0)
            await expect(page.get_by_label("Prompt")).to_be_enabled(enabled=not manages)
            await expect(page.locator("#registrations")).to_be_visible(visible=manages)
            await expect(page.locator("#caller")).to_contain_text("may not")
            # The base is out of this token's scope, and so is not offered.
            await expect(page.locator("#chosen li")).to_have_text(["sql×"])


async def test_a_full_queue_is_told_with_when_to_come_back(browser: Browser) -> None:
    async with running_server() as server:
        server.engine.error = QueueFullError(4, 3.0)
        async with visiting(browser, server.http) as page:
            await ask(page, "hello")
            card = answer(page, "echo")
            await expect(card).to_have_attribute("data-state", "failed")
            await expect(card.locator(".figures")).to_contain_text("(in 3 s)")


async def test_a_stream_that_fails_keeps_what_it_said(browser: Browser) -> None:
    async with running_server() as server:
        server.engine.error, server.engine.error_after = FieldInvalidError("prompt", "went bad"), 6
        async with visiting(browser, server.http) as page:
            await ask(page, "hello")
            card = answer(page, "echo")
            await expect(card.locator(".figures")).to_contain_text("went bad")
            await expect(card.locator(".text")).to_have_text("user:")


async def test_a_server_that_dies_is_told_and_one_that_comes_back_is_read_again(browser: Browser) -> None:
    async with running_server() as server:
        await register(server, "sql")
        server.engine.step_s = 0.1
        async with visiting(browser, server.http) as page:
            await expect(row(page, "sql")).to_be_visible()
            await page.context.set_offline(True)
            await expect(page.get_by_role("alert")).to_contain_text("does not answer")
            await register(server, "new", "b")
            await page.context.set_offline(False)
            await expect(row(page, "new")).to_be_visible()
            await expect(page.locator("#notice")).to_be_hidden()
            await ask(page, "x" * 300)
            await expect(answer(page, "echo")).to_have_attribute("data-state", "running")
            await page.context.set_offline(True)
            await expect(page.locator("#notice")).to_contain_text("does not answer")
    async with running_server() as server, visiting(browser, server.http) as page:
        await expect(page.locator("#tasks-state")).to_contain_text("No tasks yet")
        await server.stop_http()
        await expect(page.locator("#notice")).to_contain_text("does not answer")
        await ask(page, "hello")
        await expect(answer(page, "echo").locator(".figures")).to_contain_text("does not answer")


async def test_a_server_that_loads_is_waited_for(browser: Browser) -> None:
    async with running_server(is_open=False) as server, visiting(browser, server.http) as page:
        await expect(page.locator("#notice")).to_contain_text("being loaded")
        server.gate.open(make_backend(server.engine, server.store))
        await expect(page.locator("#tasks-state")).to_contain_text("No tasks yet")
        await expect(page.locator("#notice")).to_be_hidden()


# Managing.


async def test_versions_are_activated_and_deleted(browser: Browser) -> None:
    async with running_server() as server:
        await register(server, "sql", "a")
        await register(server, "sql", "b")
        async with visiting(browser, server.http) as page:
            await expect(row(page, "sql").locator(".badge")).to_have_text("v2")
            await page.get_by_role("button", name="Other versions of sql").click()
            await page.get_by_role("button", name="Activate sql@1").click()
            await expect(page.locator("#notice")).to_have_text("sql@1 is active.")
            await expect(row(page, "sql").locator(".badge")).to_have_text("v1")
            assert server.store.resolve("sql").version == 1
            server.engine.used.add("sql@2")
            await page.get_by_role("button", name="Delete sql@2").click()
            dialog = page.get_by_role("dialog", name="Delete sql@2?")
            await dialog.get_by_role("button", name="Delete").click()
            await expect(dialog.get_by_role("alert")).to_be_visible()
            await dialog.get_by_role("button", name="Delete anyway").click()
            await expect(page.locator("#tasks tr.main-row + tr")).to_have_count(0)
            await page.get_by_role("button", name="Delete sql").click()
            await page.keyboard.press("Escape")
            assert list(server.store.tasks) == ["sql"]
            await page.get_by_role("button", name="Delete sql").click()
            await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
            await expect(page.locator("#tasks-state")).to_contain_text("No tasks yet")
            assert server.store.tasks == {}


async def test_an_adapter_is_uploaded_and_its_result_is_counted(browser: Browser, tmp_path: Path) -> None:
    files = [tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"]
    files[0].write_text("{}")
    files[1].write_bytes(bytes(300_000))
    async with running_server() as server, visiting(browser, server.http) as page:
        await page.get_by_role("button", name="Upload an adapter").click()
        dialog = page.get_by_role("dialog", name="Upload an adapter")
        await page.get_by_label("Task", exact=True).fill("NO")
        await page.get_by_label("Files").set_input_files(files)
        await dialog.get_by_role("button", name="Upload").click()
        await expect(dialog.get_by_role("alert")).to_contain_text("taskId")
        await page.get_by_label("Task", exact=True).fill("sql")
        await dialog.get_by_role("button", name="Upload").click()
        await expect(page.locator("#notice")).to_have_text("sql@1 is registered.")
        await expect(row(page, "sql")).to_be_visible()
        await expect(page.locator("#results")).to_contain_text("created")
        await expect(page.locator("#results")).to_contain_text("refused: FIELD_INVALID")
    (upload,) = server.store.uploads
    assert upload.names == ["adapter_config.json", "adapter_model.safetensors"]
    assert sum(len(data) for _, _, data in upload.pieces) == 300_002


# For everyone.


async def test_all_of_it_works_by_keyboard(browser: Browser) -> None:
    async with running_server() as server:
        await register(server, "sql")
        server.engine.step_s = 0.02
        async with visiting(browser, server.http) as page:
            await expect(row(page, "sql")).to_be_visible()
            await page.keyboard.press("Tab")
            await expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
            await page.keyboard.press("Enter")
            await expect(page.get_by_label("Prompt")).to_be_focused()
            await page.keyboard.type("hello " * 20)
            await page.keyboard.press("Tab")
            await expect(page.get_by_label("Leave out echo")).to_be_focused()
            await page.keyboard.press("Enter")
            await expect(page.get_by_label("Add a task or a version to ask")).to_be_focused()
            await page.keyboard.press("Shift+Tab")
            await page.keyboard.press("Shift+Tab")
            await page.keyboard.press("Control+Enter")
            await expect(answer(page, "sql")).to_have_attribute("data-state", "running")
            await page.get_by_label("Stop sql").focus()
            await page.keyboard.press("Enter")
            await expect(answer(page, "sql")).to_have_attribute("data-state", "stopped")
            await page.get_by_role("button", name="Delete sql").focus()
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("button", name="Keep")).to_be_focused()
            await page.keyboard.press("Escape")
            await expect(page.get_by_role("button", name="Delete sql")).to_be_focused()


UNNAMED = """
[...document.querySelectorAll("button, input, textarea")]
  .filter((each) => !(each.ariaLabel || each.labels?.length || each.textContent.trim()))
  .map((each) => each.outerHTML)
"""


@pytest.mark.parametrize("width", [360, 1280])
async def test_nothing_scrolls_sideways_and_everything_has_a_name(browser: Browser, width: int) -> None:
    long = "a" * 63
    async with running_server() as server:
        await register(server, long, labels={"x" * 200: "y" * 200, "default.temperature": "0"})
        await register(server, long, "b")
        for index in range(10):
            await register(server, f"task-{index}", "c")
        async with visiting(browser, server.http, width=width, height=740) as page:
            await page.get_by_role("button", name=f"Other versions of {long}").click()
            await ask(page, "w" * 120)
            await expect(answer(page, long)).to_have_attribute("data-state", "done")
            await page.get_by_label("Filter tasks by name").fill("aaa")
            await expect(page.locator("#tasks tbody")).to_have_count(1)
            for name in ("Upload an adapter", f"Delete {long}@1"):
                await page.get_by_role("button", name=name).click()
                assert await page.evaluate("document.documentElement.scrollWidth") <= width
                box = await page.get_by_role("dialog").bounding_box()
                assert box is not None
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= width
                await page.keyboard.press("Escape")
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
            assert await page.evaluate(UNNAMED) == []
