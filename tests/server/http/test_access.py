"""Who may call the HTTP port: tokens, roles, tasks, hosts, origins, certificates; what loading and draining answer."""

from __future__ import annotations

import asyncio
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import trustme

from manyhats.adapters.heads import TaskKind
from manyhats.server.access.tokens import Role, TokenFile
from manyhats.server.http.app import make_app
from manyhats.server.http.call import Surroundings
from manyhats.server.http.port import HttpPort
from manyhats.server.service.answers import Answers
from support.fakes.server import Running, make_record, running_server
from support.harnesses.http import Reply, exchange, head, request
from support.servers.secure import add_token, make_pki, secured_server

CHAT = "/v1/chat/completions"
BODY: Any = {"messages": [{"role": "user", "content": "hi"}]}
UNKNOWN = "mh_unknown"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.yaml"
    path.touch()
    return path


async def chat(server: Running, *headers: str, model: str = "") -> Reply:
    return await exchange(server.http, request(CHAT, {**BODY, "model": model}, *headers))


async def test_each_clients_way_to_show_a_token(token_file: Path) -> None:
    token = add_token(token_file, "one")
    other = add_token(token_file, "two")
    async with running_server(tokens=TokenFile(token_file)) as server:
        for good in (f"authorization: Bearer {token}", f"authorization: bearer {token}", f"api-key: {token}"):
            assert (await chat(server, good)).status == 200
        assert (await chat(server, f"x-api-key: {token}", f"authorization: Bearer {token}")).status == 200
        refused: list[tuple[str, ...]] = [
            (),
            ("authorization: ",),
            (f"authorization: {token}",),
            (f"authorization: Basic {token}",),
            (f"authorization: Bearer {UNKNOWN}",),
            (f"authorization: Bearer {token}", f"api-key: {other}"),
            (f"authorization: Bearer {token}", f"x-api-key: {UNKNOWN}"),
            (f"authorization: Bearer {token}", f"authorization: Bearer {token}"),
        ]
        for headers in refused:
            reply = await chat(server, *headers)
            assert (reply.status, reply.error["code"], reply.headers["www-authenticate"]) == (
                401,
                "invalid_api_key",
                "Bearer",
            )


async def test_a_role_is_checked_before_the_body_is_read(token_file: Path) -> None:
    token = add_token(token_file, "manager", [Role.MANAGE])
    async with running_server(tokens=TokenFile(token_file)) as server:
        for credential, status in ((token, 403), (UNKNOWN, 401)):
            # Of this body nothing ever comes.
            reply = await exchange(server.http, head(CHAT, 1000, f"api-key: {credential}"))
            assert reply.status == status


async def test_a_token_reaches_its_tasks_only(token_file: Path) -> None:
    token = add_token(token_file, "one", tasks=["a", "b.*"])
    key = f"api-key: {token}"
    async with running_server(tokens=TokenFile(token_file)) as server:
        for task in ("a", "b.x", "c"):
            server.store.tasks[task] = [make_record(task)]
        for model, status in {
            "a": 200,
            "a@1": 200,
            "b.x": 200,
            "echo:a": 200,
            "c": 403,
            "c@1": 403,
            "no": 403,
        }.items():
            assert ((await chat(server, key, model=model)).status, model) == (status, model)
        for model in ("", "echo"):
            reply = await chat(server, key, model=model)
            assert (reply.status, reply.error["code"]) == (403, "task_not_allowed")
        models = await exchange(server.http, head("/v1/models", None, key, method="GET"))
        assert [each["id"] for each in models.json["data"]] == ["a", "b.x"]
        for name in ("c", "echo", ""):
            assert (
                await exchange(server.http, head(f"/v1/models/{name}", None, key, method="GET"))
            ).status == 403


async def test_what_a_header_says_of_the_task_decides_nothing(token_file: Path) -> None:
    """``x-manyhats-task`` is for proxies."""
    token = add_token(token_file, "one", [Role.GENERATE], ["mine"])
    async with running_server(tokens=TokenFile(token_file)) as server:
        for task in ("mine", "hats"):
            server.store.tasks[task] = [make_record(task)]
        for said in ("mine", "hats", "no such"):
            headers = (f"authorization: Bearer {token}", f"x-manyhats-task: {said}")
            reply = await chat(server, *headers, model="mine")
            assert (reply.status, reply.headers["x-manyhats-version"]) == (200, "mine@1")
            assert (await chat(server, *headers, model="hats")).status == 403


async def test_probes_and_metrics_need_no_token(token_file: Path) -> None:
    add_token(token_file, "one")
    async with running_server(tokens=TokenFile(token_file)) as server:
        for path in (
            "/healthz",
            "/readyz",
            "/storez",
            "/health",
            "/ping",
            "/v2/health/live",
            "/v2/health/ready",
            "/metrics",
        ):
            assert (await exchange(server.http, head(path, None, method="GET"))).status == 200
        assert (await exchange(server.http, head("/v1/models", None, method="GET"))).status == 401


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:8000", True),
        ("127.1.2.3", True),
        ("[::1]:8000", True),
        ("many.localhost", True),
        ("example.org", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("10.0.0.1", False),
        ("[::2]", False),
        ("", False),
    ],
)
async def test_a_page_of_the_web_cannot_make_its_name_ours(host: str, is_ours: bool) -> None:
    async with running_server() as server:
        data = f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
        reply = await exchange(server.http, data)
        assert reply.status == (200 if is_ours else 403)
        assert is_ours or reply.error["code"] == "host_not_allowed"


async def test_pages_of_given_origins_may_call() -> None:
    async with running_server() as server:
        around = Surroundings(calls=server.calls, answers=Answers(unread_limit_s=5))
        port = HttpPort(make_app(around, origins=["https://a.example"]), host="127.0.0.1", port=0)
        await port.start()
        try:
            for origin, is_allowed in (("https://a.example", True), ("https://b.example", False)):
                asks = head(
                    CHAT, 0, f"origin: {origin}", "access-control-request-method: POST", method="OPTIONS"
                )
                reply = await exchange(port.address, asks)
                assert (reply.headers.get("access-control-allow-origin") == origin) == is_allowed
        finally:
            await port.stop(0)
        asks = head(
            CHAT, 0, "origin: https://a.example", "access-control-request-method: POST", method="OPTIONS"
        )
        assert (await exchange(server.http, asks)).status == 405


async def test_loading_and_draining_are_unavailable_with_a_hint() -> None:
    async with running_server(is_open=False) as server:
        reply = await chat(server)
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "loading", "1")
    async with running_server() as server:
        server.gate.drain()
        reply = await chat(server)
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "draining", "1")


async def test_more_calls_than_the_gate_holds_are_to_come_again() -> None:
    async with running_server(max_calls=1) as server:
        server.engine.step_s = 0.05
        replies = await asyncio.gather(*(chat(server) for _ in range(3)))
        assert sorted(reply.status for reply in replies) == [200, 429, 429]
        late = next(reply for reply in replies if reply.status == 429)
        assert int(late.headers["retry-after-ms"]) > 0


async def test_with_client_certificates_the_api_needs_one_and_probes_do_not(tmp_path: Path) -> None:
    pki = make_pki(tmp_path)

    def ask(context: ssl.SSLContext, path: str) -> int:
        try:
            with urllib.request.urlopen(f"https://{server.http}{path}", timeout=5, context=context) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    async with secured_server(tls=pki.mutual_files) as server:
        with_one = pki.https()
        pki.authority.issue_cert("caller@example.org").configure_cert(with_one)
        strange = pki.https()
        trustme.CA().issue_cert("stranger@example.org").configure_cert(strange)
        assert await asyncio.to_thread(ask, pki.https(), "/readyz") == 200
        assert await asyncio.to_thread(ask, pki.https(), "/metrics") == 200
        assert await asyncio.to_thread(ask, pki.https(), "/v1/models") == 401
        assert await asyncio.to_thread(ask, with_one, "/v1/models") == 200
        with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(ask, strange, "/v1/models")


READINGS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "a"},
    "/embed": {"inputs": "a"},
    "/v1/classify": {"input": "a"},
    "/classify": {"input": "a"},
    "/predict": {"inputs": "a"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/rerank": {"query": "a", "texts": ["b"]},
}


@pytest.mark.parametrize("path", READINGS)
async def test_tasks_that_read_texts_are_reached_as_others_are(token_file: Path, path: str) -> None:
    key = f"api-key: {add_token(token_file, 'one', tasks=['a'])}"
    manager = f"api-key: {add_token(token_file, 'manager', [Role.MANAGE])}"
    kind = TaskKind.EMBED if "embed" in path else TaskKind.CLASSIFY
    async with running_server(tokens=TokenFile(token_file)) as server:
        for task in ("a", "b"):
            server.store.tasks[task] = [make_record(task, kind=kind)]

        async def ask(*headers: str, **fields: Any) -> int:
            return (await exchange(server.http, request(path, READINGS[path] | fields, *headers))).status

        assert await ask(key, model="a") == await ask(key, model="a@1") == 200
        assert await ask(key, model="b") == await ask(key, model="no") == await ask(key) == 403
        assert await ask(manager, model="a") == 403
        assert await ask(model="a") == 401
        if path not in ("/v1/embeddings", "/v1/classify", "/classify"):
            assert await ask(key, "x-task-id: a") == 200
            assert await ask(key, "x-task-id: b") == 403
            assert await ask(key, "x-task-id: a", "x-task-id: b") == 400
