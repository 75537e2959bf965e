"""The page: static files of this folder, under headers that let it load and call nothing but this server."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'; object-src 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }
)


def routes() -> list[Route]:
    """``/`` is the page, ``/page/`` has what it is made of."""
    found = sorted(each.name for each in files(__name__).iterdir() if _suffix(each.name) in _TYPES)
    return [_route("/" if name == "index.html" else f"/page/{name}", name) for name in found]


def _route(path: str, name: str) -> Route:
    body = files(__name__).joinpath(name).read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    headers = {**HEADERS, "etag": tag, "content-type": _TYPES[_suffix(name)]}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)

    return Route(path, answer)


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2]
