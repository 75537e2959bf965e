from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from manyhats.adapters.errors import AdapterError, SourceNotAllowedError, SourceUnavailableError
from manyhats.adapters.sources.http import HttpDirectory, is_public

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HOST = "adapters.example"


class Handler(BaseHTTPRequestHandler):
    """Serves ``files``, and whatever status and headers ``answers`` has for a path."""

    files: dict[str, bytes]
    answers: dict[str, tuple[int, dict[str, str]]]
    seen: list[tuple[str, str, str]]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> bytes:
        self.seen.append((self.command, self.path, self.headers["Host"]))
        content = self.files.get(self.path)
        status, headers = self.answers.get(self.path, (404 if content is None else 200, {}))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content or b""))} | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        return content or b""


class QuietServer(ThreadingHTTPServer):
    """Says nothing of callers that leave."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class Site:
    """A web server on loopback that a made-up host name leads to."""

    def __init__(self) -> None:
        self.files = {f"/a/fr/{CONFIG}": b"{}", f"/a/fr/{WEIGHTS}": b"tensors" * 1000}
        self.answers: dict[str, tuple[int, dict[str, str]]] = {}
        self.seen: list[tuple[str, str, str]] = []
        fields = {"files": self.files, "answers": self.answers, "seen": self.seen}
        self._server = QuietServer(("127.0.0.1", 0), type("SiteHandler", (Handler,), fields))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def uri(self) -> str:
        return f"http://{HOST}:{self._server.server_port}/a/fr"

    def open(self) -> HttpDirectory:
        return HttpDirectory(
            self.uri, resolve=lambda host, port: ["127.0.0.1"], may_connect=lambda address: True
        )

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    with closing(Site()) as site:
        yield site


def test_the_files_of_an_adapter_are_found_and_read(site: Site) -> None:
    directory = site.open()
    assert directory.sizes() == {CONFIG: 2, WEIGHTS: 7000}
    assert b"".join(directory.read(WEIGHTS, 7000)) == b"tensors" * 1000
    assert {host for _, _, host in site.seen} == {site.uri.split("/")[2]}


def test_files_that_would_be_left_unused_are_seen(site: Site) -> None:
    site.files["/a/fr/adapter_model.bin"] = b"pickle"
    site.files["/a/fr/model_head.safetensors"] = b"head"
    assert {"adapter_model.bin", "model_head.safetensors"} <= site.open().sizes().keys()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_never_followed(site: Site, status: int) -> None:
    site.answers[f"/a/fr/{CONFIG}"] = (status, {"Location": f"{site.uri}/{WEIGHTS}"})
    with pytest.raises(SourceNotAllowedError, match="redirect"):
        site.open().sizes()
    with pytest.raises(SourceNotAllowedError, match="redirect"):
        list(site.open().read(CONFIG, 2))
    assert {path for _, path, _ in site.seen} == {f"/a/fr/{CONFIG}"}


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        (401, {}, SourceNotAllowedError),
        (403, {}, SourceNotAllowedError),
        (500, {}, SourceUnavailableError),
        (206, {}, SourceUnavailableError),
        (200, {"Content-Length": ""}, SourceNotAllowedError),
        (200, {"Content-Length": "-1"}, AdapterError),
        (200, {"Content-Encoding": "gzip"}, SourceNotAllowedError),
    ],
)
def test_other_answers_are_refused(
    site: Site, status: int, headers: dict[str, str], error: type[AdapterError]
) -> None:
    site.answers[f"/a/fr/{CONFIG}"] = (status, headers)
    with pytest.raises(error):
        site.open().sizes()


def test_reading_stops_soon_after_the_size_that_was_announced(site: Site) -> None:
    taken = sum(map(len, site.open().read(WEIGHTS, 10)))
    assert 10 < taken <= 7000
    site.files[f"/a/fr/{WEIGHTS}"] = bytes(64 * 1024 * 1024)
    assert sum(map(len, site.open().read(WEIGHTS, 10))) <= 1024 * 1024


def test_a_server_that_does_not_answer_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    open_gone = partial(
        HttpDirectory,
        f"http://{HOST}:{port}/a",
        resolve=lambda host, port: ["127.0.0.1"],
        may_connect=lambda address: True,
    )
    with pytest.raises(SourceUnavailableError):
        open_gone().sizes()


def test_a_server_without_the_hosts_certificate_is_not_read(site: Site) -> None:
    uri = site.uri.replace("http://", "https://")
    directory = HttpDirectory(uri, resolve=lambda host, port: ["127.0.0.1"], may_connect=lambda address: True)
    with pytest.raises(SourceUnavailableError, match="SSL"):
        directory.sizes()


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["10.0.0.1"], ["93.184.215.14", "169.254.169.254"], ["::1"], ["fe80::1%eth0"]],
)
def test_a_host_with_an_address_inside_is_refused_before_a_connection(
    addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("it connected")

    monkeypatch.setattr(socket, "create_connection", never)
    with pytest.raises(SourceNotAllowedError, match="public internet"):
        HttpDirectory(f"https://{HOST}/a", resolve=lambda host, port: addresses)


def test_the_name_is_asked_for_once_and_its_address_kept(site: Site) -> None:
    answers = iter([["127.0.0.1"]])
    directory = HttpDirectory(
        site.uri, resolve=lambda host, port: next(answers), may_connect=lambda address: True
    )
    directory.sizes()
    assert list(directory.read(CONFIG, 2)) == [b"{}"]


def test_a_host_that_nobody_knows_is_unavailable() -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror("unknown")

    for resolve in (unknown, lambda host, port: []):
        with pytest.raises(SourceUnavailableError, match="its host is unknown"):
            HttpDirectory(f"https://{HOST}/a", resolve=resolve)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.2.1",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "ff02::1",
        "2001:db8::1",
    ],
)
def test_addresses_that_are_not_on_the_open_internet(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "::ffff:8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]
)
def test_addresses_on_the_open_internet(address: str) -> None:
    assert is_public(address)
