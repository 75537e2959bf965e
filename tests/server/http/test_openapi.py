"""The description of the HTTP port: what is served, what is checked in, and whether answers fit it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from starlette.applications import Starlette
from starlette.testclient import TestClient

import write_openapi
from manyhats.adapters.heads import TaskKind
from manyhats.server.http.app import make_app, operations
from manyhats.server.http.call import Surroundings
from manyhats.server.http.status import KINDS
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.answers import Answers
from manyhats.server.service.call import Calls
from manyhats.server.service.gate import Gate
from support.fakes.server import EchoEngine, MemoryStore, make_backend, make_record

FILE = Path(__file__).parents[3] / "docs/openapi.json"


def make_echo() -> Any:
    """The application on fakes, without a socket."""
    metrics, gate = Metrics(max_task_labels=10), Gate(heartbeat_limit_s=5.0)
    store = MemoryStore()
    store.tasks["sql"] = [make_record("sql")]
    moods = {"class.0": "good", "class.1": "bad"}
    store.tasks["mood"] = [make_record("mood", labels=moods, kind=TaskKind.CLASSIFY)]
    store.tasks["relevance"] = [make_record("relevance", kind=TaskKind.CLASSIFY)]
    backend = make_backend(EchoEngine(), store)
    metrics.attach(backend)
    gate.open(backend)
    return make_app(Surroundings(calls=Calls(gate, metrics), answers=Answers(unread_limit_s=60.0)))


def test_the_checked_in_description_is_served() -> None:
    answer = TestClient(make_echo()).get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.content == FILE.read_bytes()


def test_the_check_finds_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write_openapi.main(["--check"]) == 0
    changed = tmp_path / "openapi.json"
    changed.write_text(FILE.read_text().replace('"temperature"', '"warmth"'))
    monkeypatch.setattr(write_openapi, "FILE", changed)
    assert write_openapi.main(["--check"]) == 1
    assert '+          "temperature"' in capsys.readouterr().out


def test_every_route_of_the_api_is_described() -> None:
    app = make_echo()
    assert isinstance(app, Starlette)
    served = {
        (route.path.replace(":path", ""), verb.lower())  # type: ignore[attr-defined]
        for route in app.routes
        for verb in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    described = {
        (path, verb) for path, entry in json.loads(FILE.read_bytes())["paths"].items() for verb in entry
    }
    assert served - described == {("/openapi.json", "get")}
    assert described <= served


def test_every_call_says_what_it_answers_and_why_it_fails() -> None:
    for each in operations(Gate(heartbeat_limit_s=5.0), Metrics(max_task_labels=1)):
        assert each.all_errors <= KINDS.keys()
        assert any(each.answers)


schema = schemathesis.openapi.from_asgi("/openapi.json", make_echo())
schema.config.generation.update(modes=list(schemathesis.GenerationMode))
schema.config.max_stream_events = 1000


@schema.parametrize()
@settings(derandomize=True, max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_call_ends_the_server_or_in_what_is_not_described(case: schemathesis.Case) -> None:
    # Ranges and relations of fields are no part of the description: a call that fits it may be refused all the same.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


LISTS_OF_IDS = st.lists(st.integers(2, 257), min_size=1, max_size=4)
GENERATION: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["echo", "sql", "sql@1", "echo:sql", "", None]),
    "max_tokens": st.integers(1, 8),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(-1, 50),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "logit_bias": st.dictionaries(st.sampled_from(["2", "99"]), st.floats(-100, 100)),
    "stop": st.text(min_size=1, max_size=3)
    | st.lists(st.text(min_size=1, max_size=3), max_size=4)
    | st.none(),
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "return_token_ids": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
    "user": st.none() | st.text(max_size=3),
}
STREAM_OPTIONS = st.fixed_dictionaries(
    {}, optional={"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
)
CHAT = {
    **GENERATION,
    "logprobs": st.booleans(),
    "max_completion_tokens": st.integers(1, 8),
    "stream_options": STREAM_OPTIONS,
}


def messages(kind: str) -> st.SearchStrategy[Any]:
    """Conversations whose contents may be lists of parts of this type."""
    part = st.fixed_dictionaries({"type": st.just(kind), "text": st.text(max_size=3)})
    role = st.sampled_from(["user", "system", "developer", *(["assistant"] if kind == "text" else [])])
    turn = st.fixed_dictionaries({"role": role, "content": st.text(max_size=5) | st.lists(part)})
    return st.lists(turn, min_size=1, max_size=3)


COMPLETION = {
    **GENERATION,
    "logprobs": st.integers(0, 3),
    "echo": st.booleans(),
    "prompt_logprobs": st.integers(0, 3),
    "stream_options": STREAM_OPTIONS,
}
PROMPT = st.one_of(
    st.text(min_size=1, max_size=5),
    LISTS_OF_IDS,
    st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(LISTS_OF_IDS, min_size=1, max_size=3),
)
TEXT = st.text(min_size=1, max_size=5)
TEXTS = st.lists(TEXT, min_size=1, max_size=3)
RANKED = {"model": st.just("relevance"), "query": TEXT}
GOOD: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "/v1/chat/completions": st.fixed_dictionaries({"messages": messages("text")}, optional=CHAT),
    "/v1/completions": st.fixed_dictionaries({"prompt": PROMPT}, optional=COMPLETION),
    "/tokenize": st.fixed_dictionaries(
        {"prompt": st.text(min_size=1, max_size=5)},
        optional={"model": GENERATION["model"], "return_token_strs": st.booleans()},
    ),
    "/v1/responses": st.fixed_dictionaries(
        {"input": st.text(min_size=1, max_size=5) | messages("input_text")},
        optional={
            "model": GENERATION["model"],
            "instructions": st.text(min_size=1, max_size=5),
            "max_output_tokens": st.integers(16, 20),
            "temperature": GENERATION["temperature"],
            "top_logprobs": st.integers(0, 3),
            "stream": st.booleans(),
        },
    ),
    "/v1/score": st.one_of(
        st.fixed_dictionaries(
            {
                "prompt": st.text(min_size=1, max_size=5) | LISTS_OF_IDS,
                "continuations": st.lists(
                    st.text(min_size=1, max_size=5) | LISTS_OF_IDS, min_size=1, max_size=3
                ),
            },
            optional={"model": GENERATION["model"], "logprobs": st.booleans()},
        ),
        st.fixed_dictionaries(
            {
                "query": st.text(min_size=1, max_size=5),
                "items": st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3),
                "label_token_ids": LISTS_OF_IDS,
            },
            optional={"apply_softmax": st.booleans(), "item_first": st.booleans()},
        ),
    ),
    "/v1/embeddings": st.fixed_dictionaries(
        {"input": PROMPT},
        optional={
            "model": GENERATION["model"],
            "encoding_format": st.sampled_from(["float", "base64", None]),
            "dimensions": st.integers(1, 8),
            "user": GENERATION["user"],
        },
    ),
    "/embed": st.fixed_dictionaries(
        {"inputs": PROMPT}, optional={"normalize": st.booleans(), "dimensions": st.integers(1, 8)}
    ),
    "/v1/classify": st.fixed_dictionaries({"model": st.just("mood"), "input": TEXT | TEXTS}),
    "/predict": st.fixed_dictionaries(
        {
            "model": st.just("mood"),
            "inputs": TEXT
            | st.tuples(TEXT, TEXT).map(list)
            | st.lists(st.lists(TEXT, min_size=1, max_size=2), min_size=1, max_size=3),
        },
        optional={"raw_scores": st.booleans(), "truncate": st.booleans()},
    ),
    "/v1/rerank": st.fixed_dictionaries(
        {**RANKED, "documents": st.lists(TEXT | TEXT.map(lambda text: {"text": text}), min_size=1)},
        optional={"top_n": st.integers(1, 3), "return_documents": st.booleans()},
    ),
    "/rerank": st.fixed_dictionaries(
        {**RANKED, "texts": TEXTS}, optional={"raw_scores": st.booleans(), "return_text": st.booleans()}
    ),
    "/detokenize": st.fixed_dictionaries({"tokens": LISTS_OF_IDS}, optional={"model": GENERATION["model"]}),
}


@pytest.mark.parametrize("path", GOOD)
@settings(derandomize=True, max_examples=40, deadline=None)
@given(data=st.data())
def test_answers_and_events_fit_the_description(path: str, data: st.DataObject) -> None:
    body = data.draw(GOOD[path])
    if "stream_options" in body:
        body["stream"] = True
    case = schema[path]["POST"].Case(body=body, media_type="application/json")
    answer = case.call_and_validate(excluded_checks=[negative_data_rejection])
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return
    *events, nothing = answer.text.split("\n\n")
    assert nothing == ""
    if path != "/v1/responses":
        assert events.pop() == "data: [DONE]"
    for event in events:
        event_check(path).validate(json.loads(event.split("\n")[-1].removeprefix("data: ")))


@cache
def event_check(path: str) -> jsonschema.Draft202012Validator:
    """Checks the JSON of an event of a stream."""
    described = json.loads(FILE.read_bytes())
    content = described["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    (data,) = [each for each in content["schema"]["properties"]["data"]["anyOf"] if "contentSchema" in each]
    return jsonschema.Draft202012Validator({**data["contentSchema"], "components": described["components"]})
