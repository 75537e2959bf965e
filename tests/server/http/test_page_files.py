"""The page's files as the HTTP port serves them, without a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from manyhats.server.http import page
from manyhats.server.http.app import make_app
from manyhats.server.http.call import Surroundings
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.answers import Answers
from manyhats.server.service.call import Calls
from manyhats.server.service.gate import Gate

FOLDER = Path(page.__file__).parent
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".html", ".js", ".css", ".svg"))


def client(*, has_page: bool = True) -> TestClient:
    calls = Calls(Gate(heartbeat_limit_s=5.0), Metrics(max_task_labels=1))
    return TestClient(
        make_app(Surroundings(calls=calls, answers=Answers(unread_limit_s=60.0)), has_page=has_page)
    )


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_every_file_is_served_under_headers_that_keep_it_to_this_server(file: Path) -> None:
    path = "/" if file.name == "index.html" else f"/page/{file.name}"
    answer = client().get(path)
    assert answer.content == file.read_bytes()
    assert answer.headers["content-security-policy"] == (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    )
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    again = client().get(path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_nothing_else_is_served_and_without_the_page_nothing_at_all() -> None:
    assert [
        client().get(path).status_code for path in ("/page/", "/page/__init__.py", "/page/../page.js")
    ] == [404] * 3
    assert client(has_page=False).get("/").status_code == 404
    assert client(has_page=False).get("/page/page.js").status_code == 404


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_no_file_names_another_server_or_makes_markup_of_texts(file: Path) -> None:
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|DOMParser", text
    )
    assert not re.search(r"<script>|\bstyle=|\son[a-z]+=\"", text)
