"""The HTTP port's application: its routes, and what every request has around it."""

from __future__ import annotations

import time
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import msgspec
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from manyhats.server.access.addresses import is_loopback
from manyhats.server.http import management, page, probes
from manyhats.server.http.call import Endpoint, Surroundings
from manyhats.server.http.classes import Classification, ClassifyBody, PredictBody
from manyhats.server.http.embeddings import EmbedBody, EmbeddingsBody, Vectors
from manyhats.server.http.models import TASK_HEADER, Models
from manyhats.server.http.openai import OpenAI
from manyhats.server.http.openai_messages import ChatBody, CompletionBody, TokenizeBody
from manyhats.server.http.openapi import document
from manyhats.server.http.operation import OF_A_TASK, OF_RUNS, OF_TEXTS, Operation
from manyhats.server.http.rerank import RerankBody, Reranking
from manyhats.server.http.responses import Responses
from manyhats.server.http.responses_messages import ResponsesBody
from manyhats.server.http.scores import ScoreBody, Scores
from manyhats.server.http.status import ErrorAnswer, ErrorBody, own_param_of, refusal_of
from manyhats.server.http.tei_info import TeiInfo
from manyhats.server.http.tokenization import DetokenizeBody, Tokenization
from manyhats.server.http.writer import Writer
from manyhats.server.service.errors import HostNotAllowedError
from manyhats.server.service.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manyhats.server.observability.metrics import Metrics


def make_app(
    around: Surroundings, *, origins: Sequence[str] = (), is_local: bool = False, has_page: bool = False
) -> ASGIApp:
    """The application.

    Args:
        around: what its calls have around them.
        origins: of pages of other servers that may call it.
        is_local: whether it answers this machine only, and everyone on it: then a page of the Web must not reach it
            under a name of its own that it has made this machine's.
        has_page: whether it serves the page.
    """
    middleware = []
    if origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "x-manyhats-version", "retry-after", "retry-after-ms"],
            )
        )
    if is_local:
        middleware.append(Middleware(LocalHosts, around=around))
    app = Starlette(
        routes=[*_routes(around), *(page.routes() if has_page else ())],
        middleware=middleware,
        exception_handlers={HTTPException: _not_found},  # type: ignore[dict-item]
    )
    app.router.redirect_slashes = False
    return app


def _routes(around: Surroundings) -> list[Route]:
    gate, metrics = around.calls.gate, around.calls.metrics
    rows = operations(gate, metrics)
    paths = dict.fromkeys(row.path for row in rows)

    @cache
    def description() -> bytes:
        return document(rows)

    async def describe(request: Request) -> Response:
        return Response(await to_thread.run_sync(description), media_type="application/json")

    return [
        *probes.routes(gate, metrics.registry),
        Route("/openapi.json", describe),
        *(_route(path, [row for row in rows if row.path == path], around) for path in paths),
    ]


def _route(path: str, rows: Sequence[Operation[Any]], around: Surroundings) -> Route:
    """One path with all its methods, so that the answer to another method names them."""
    endpoints = {row.verb: Endpoint(around, row) for row in rows}

    class ByMethod:
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            await endpoints[method](scope, receive, send)

    return Route(path, ByMethod(), methods=list(endpoints))


def operations(gate: Gate, metrics: Metrics) -> list[Operation[Any]]:
    """All calls of the port, on the backend behind the gate."""
    models = Models(gate, time.time())
    openai = OpenAI(gate, metrics)
    tokens = Tokenization(gate, metrics)
    scores = Scores(gate, metrics)
    responses = Responses(gate, metrics)
    post, get = partial(Operation, verb="POST"), partial(Operation, verb="GET")
    return [
        post(
            path="/v1/chat/completions",
            method="ChatCompletions",
            handle=openai.chat,
            body=ChatBody,
            summary="Answer a conversation.",
            errors=OF_RUNS,
        ),
        post(
            path="/v1/completions",
            method="Completions",
            handle=openai.completions,
            body=CompletionBody,
            summary="Continue texts.",
            errors=OF_RUNS,
        ),
        post(
            path="/v1/responses",
            method="Responses",
            handle=responses.respond,
            body=ResponsesBody,
            summary="Answer a conversation, in the form of the Responses API; nothing is stored.",
            errors=OF_RUNS,
        ),
        get(
            path="/v1/models",
            method="ListModels",
            handle=models.list,
            summary="List the base model and the tasks, each a model.",
        ),
        get(
            path="/v1/models/{id:path}",
            method="GetModel",
            handle=models.get,
            summary="Show the base model, a task or one of its versions.",
            errors=OF_A_TASK,
        ),
        post(
            path="/v1/score",
            method="Score",
            handle=scores.score,
            body=ScoreBody,
            summary="Give the log-probability of each continuation of a prompt.",
            errors=OF_RUNS,
        ),
        *_encodings(gate, metrics),
        post(
            path="/tokenize",
            method="Tokenize",
            handle=tokens.tokenize,
            body=TokenizeBody,
            summary="Split a text or a conversation into tokens.",
            errors=OF_TEXTS,
        ),
        post(
            path="/detokenize",
            method="Detokenize",
            handle=tokens.detokenize,
            body=DetokenizeBody,
            summary="Join tokens to a text.",
            errors=OF_TEXTS,
        ),
        get(
            path="/tokenizer_info",
            method="TokenizerInfo",
            handle=tokens.info,
            summary="Show a task's chat template and special tokens.",
            query={"model": "The task; the base model without it."},
            errors=OF_TEXTS,
        ),
        *management.operations(gate, metrics),
    ]


def _encodings(gate: Gate, metrics: Metrics) -> list[Operation[Any]]:
    """Calls that read texts and generate nothing."""
    vectors, classes = Vectors(gate, metrics), Classification(gate, metrics)
    reranking = Reranking(gate, metrics)
    post = partial(Operation, verb="POST", errors=OF_RUNS)
    names_task = {TASK_HEADER: "The task, where `model` does not name it."}
    return [
        Operation(
            verb="GET",
            path="/info",
            method="GetModel",
            handle=TeiInfo(gate).info,
            summary="Show what the base or a task does, in the form of Text Embeddings Inference.",
            query={"model": "The task; the base model without it."},
            headers=names_task,
            errors=OF_TEXTS | {"TASK_KIND_MISMATCH"},
        ),
        post(
            path="/v1/embeddings",
            method="Embed",
            handle=vectors.embeddings,
            body=EmbeddingsBody,
            summary="Give a vector for each text.",
        ),
        *(
            post(
                path=path,
                method="Classify",
                handle=classes.classify,
                body=ClassifyBody,
                summary="Give the probability of each of a task's classes for texts.",
            )
            for path in ("/v1/classify", "/classify")
        ),
        *(
            post(
                path=path,
                method="Rerank",
                handle=reranking.rerank,
                body=RerankBody,
                summary="Say how relevant texts are to a query.",
                name_of=own_param_of,
                headers=names_task,
            )
            for path in ("/v1/rerank", "/rerank")
        ),
        post(
            path="/embed",
            method="Embed",
            handle=vectors.embed,
            body=EmbedBody,
            summary="Give a vector for each text, in the form of Text Embeddings Inference.",
            name_of=own_param_of,
            headers=names_task,
        ),
        post(
            path="/predict",
            method="Classify",
            handle=classes.predict,
            body=PredictBody,
            summary="Give the scores of a task's classes for texts or pairs, in that form.",
            name_of=own_param_of,
            headers=names_task,
        ),
    ]


async def _not_found(request: Request, error: HTTPException) -> Response:
    """404 and 405, in OpenAI's form."""
    text = {
        404: f"there is no route {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    body = ErrorBody(text.get(error.status_code, error.detail), "invalid_request_error", None, code)
    return Response(
        msgspec.json.encode(ErrorAnswer(body)),
        error.status_code,
        headers=error.headers,
        media_type="application/json",
    )


class LocalHosts:
    """Refuses requests to a local server whose ``Host`` is not this machine's name."""

    def __init__(self, app: ASGIApp, around: Surroundings) -> None:
        self._app = app
        self._around = around

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        hosts = [value for name, value in scope.get("headers", ()) if name == b"host"]
        foreign = [host for host in hosts if not _is_local(host.decode("latin-1"))]
        if scope["type"] == "http" and foreign:
            refusal = refusal_of(HostNotAllowedError(foreign[0].decode("latin-1")[:200]))
            writer = Writer(send, scope, self._around.answers)
            await writer.fail(refusal)
            writer.close()
            return
        await self._app(scope, receive, send)


def _is_local(host: str) -> bool:
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name.lower().rstrip(".")) or name.lower().endswith(".localhost")
