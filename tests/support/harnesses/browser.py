"""A headless browser on the page of a server, which notes whatever must not happen there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import Browser, Page, async_playwright

_PROGRAM = "/usr/bin/chromium"
_WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


@asynccontextmanager
async def running_browser() -> AsyncIterator[Browser]:
    """A browser with a profile of its own, for which no name but this machine's has an address."""
    arguments = [
        "--no-sandbox",  # as root, in a container
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=_PROGRAM, args=arguments)
        yield browser
        await browser.close()


@asynccontextmanager
async def visiting(
    browser: Browser, address: str, *, width: int = 1280, height: int = 900, **options: Any
) -> AsyncIterator[Page]:
    """The page at ``address``.

    At the end, nothing has gone wrong in it: no error, no violation of its policy, no request to anywhere else. What
    the server refuses is no error of the page's.
    """
    origin = f"http://{address}/"
    context = await browser.new_context(viewport={"width": width, "height": height}, **options)
    page = await context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if _is_bad(message) else None)
    page.on(
        "request", lambda request: None if request.url.startswith(origin) else problems.append(request.url)
    )
    await page.add_init_script(_WATCH)
    page.set_default_timeout(15_000)
    await page.goto(origin)
    yield page
    problems += await page.evaluate("window.violations")
    await context.close()
    assert problems == []


def _is_bad(message: Any) -> bool:
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")
