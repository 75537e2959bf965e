"""The blocking client over a real port."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import grpc
import pytest

from manyhats.client import (
    AdapterRef,
    ArtifactPart,
    Client,
    FinishReason,
    Token,
    Tokenization,
    TopToken,
    UnavailableError,
    Usage,
)
from support.fakes.client import CREATE_TIME, PIECES, TEXT, FakeServer

USAGE = Usage(
    prompt_tokens=7, cached_prompt_tokens=3, generated_tokens=4, queue_ms=1.5, prefill_ms=2.5, decode_ms=3.5
)


def test_generate(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        answer = client.generate("hi", task_id="sql", request_id="r-1", max_new_tokens=5)
    assert answer.text == TEXT
    assert [token.text for token in answer.tokens] == list(PIECES)
    assert answer.finish_reason is FinishReason.EOS
    assert answer.usage == USAGE
    assert answer.adapter == AdapterRef("sql", 2, "sha256:ab")
    assert answer.request_id == "r-1"
    assert fake.last_request.stopping.max_new_tokens == 5


def test_generate_on_the_base_model_with_logprobs(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        answer = client.generate("hi", logprobs=True, top_logprobs=1, prompt_logprobs=True)
    assert answer.adapter is None
    assert answer.tokens[1] == Token(11, ", ", -1.0, 2, (TopToken(99, "best", -0.1),))
    assert answer.prompt_tokens[0].logprob is None


def test_stream_gives_pieces_and_then_the_whole(fake: FakeServer) -> None:
    with Client(fake.target) as client, client.generate_stream("hi", task_id="sql") as stream:
        chunks = list(stream)
        whole = stream.result()
    assert [chunk.text for chunk in chunks] == list(PIECES)
    assert chunks[0].adapter == whole.adapter == AdapterRef("sql", 2, "sha256:ab")
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(PIECES) - 1)
    assert chunks[1].usage is None
    assert (whole.text, whole.finish_reason, whole.usage) == (TEXT, FinishReason.LENGTH, USAGE)
    assert whole.request_id == "made-by-server"


def test_result_of_a_stream_nobody_iterated(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        assert client.generate_stream("hi").result().text == TEXT


def test_leaving_a_stream_early_cancels_it_on_the_server(fake: FakeServer) -> None:
    fake.is_endless = True
    with Client(fake.target) as client, client.generate_stream("hi") as stream:
        next(stream)
        assert not fake.stream_ended.is_set()
        stream.close()
        assert fake.stream_ended.wait(timeout=5)
        assert list(stream) == []
        assert stream.result().finish_reason is FinishReason.UNSPECIFIED


def test_an_exception_in_the_with_block_cancels_the_stream(fake: FakeServer) -> None:
    fake.is_endless = True
    with Client(fake.target) as client:
        with suppress(KeyError), client.generate_stream("hi") as stream:
            next(stream)
            raise KeyError
        assert fake.stream_ended.wait(timeout=5)


def test_close_from_another_thread_ends_the_iteration(fake: FakeServer) -> None:
    fake.is_endless = True
    with Client(fake.target) as client, client.generate_stream("hi") as stream:
        threading.Timer(0.1, stream.close).start()
        for _ in stream:
            pass
        assert fake.stream_ended.wait(timeout=5)


def test_score(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        result = client.score("2 + 2 =", [" 4", [5]], task_id="sql", priority=1)
    assert [score.logprob for score in result.scores] == [-1.0, -2.0]
    assert result.scores[0].tokens[0].rank == 1
    assert result.request_id == "made-by-server"


def test_tokenize(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        assert client.tokenize("ab", add_special_tokens=False) == Tokenization((1, 2), ("a", "b"))
    assert fake.last_request.HasField("add_special_tokens")


def test_register_adapter(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        registration = client.register_adapter("sql", "/adapters/sql", labels={"team": "a"}, activate=False)
    assert registration.created
    assert registration.adapter.name == "sql@3"
    assert registration.adapter.create_time == CREATE_TIME
    assert (registration.adapter.method, registration.adapter.residency) == ("lora", "device")
    request = fake.last_request
    assert (request.uri, dict(request.labels)) == ("/adapters/sql", {"team": "a"})
    assert request.HasField("activate")
    assert not request.activate


def test_register_adapter_of_parts(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        registration = client.register_adapter("sql", parts=[("/a", 0.5), ("/b", 1.0)])
    assert [(part.uri, part.weight) for part in fake.last_request.parts] == [("/a", 0.5), ("/b", 1.0)]
    assert registration.adapter.parts == (ArtifactPart("sha256:aa", 0.5, "/adapters/sql"),)


def test_activate_adapter(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        assert client.activate_adapter("sql@2").name == "sql@2"
    assert fake.last_request.task_id == "sql@2"


def test_pin_and_unpin_adapter(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        assert client.pin_adapter("sql").pinned
        assert fake.last_request.task_id == "sql"
        assert not client.unpin_adapter("sql").pinned
        assert not client.get_adapter("sql").pinned


def test_get_adapter(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        info = client.get_adapter("sql@2")
    assert (info.task_id, info.version, info.effect, info.notes) == ("sql", 2, 0.25, ("names no base",))


def test_list_adapters_fetches_pages_as_needed(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        listed = client.list_adapters()
        assert fake.requests == []
        assert [next(listed).name, next(listed).name] == ["sql@1", "sql@2"]
        assert len(fake.requests) == 1
        assert [info.name for info in listed] == ["tldr@1"]
    assert [request.page_token for request in fake.requests] == ["", "2"]  # type: ignore[attr-defined]


def test_list_adapters_of_one_task(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        assert [info.name for info in client.list_adapters(task_id="sql", page_size=1)] == ["sql@1", "sql@2"]


def test_answers_may_be_larger_than_the_default_of_grpc(fake: FakeServer) -> None:
    fake.adapters[0].source = "x" * 5_000_000
    with Client(fake.target) as client:
        assert len(next(client.list_adapters()).source) == 5_000_000


def test_delete_adapter_gives_what_was_deleted(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        assert [info.name for info in client.delete_adapter("sql", force=True)] == ["sql@1", "sql@2"]
    assert fake.last_request.force


def test_server_info(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        info = client.server_info()
    assert (info.base_model, info.max_context_length, info.quantization) == ("tiny-base", 8192, "nf4")


def test_wait_ready_returns_once_the_server_serves(fake: FakeServer) -> None:
    fake.set_serving(False)
    threading.Timer(0.2, fake.set_serving, [True]).start()
    started = time.monotonic()
    with Client(fake.target) as client:
        client.wait_ready(timeout_s=10)
    assert time.monotonic() - started >= 0.15


def test_wait_ready_tells_not_serving_from_not_there(fake: FakeServer) -> None:
    fake.set_serving(False)
    with Client(fake.target) as client, pytest.raises(UnavailableError, match="not serving yet"):
        client.wait_ready(timeout_s=0.3)
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError, match="does not answer"):
        client.wait_ready(timeout_s=0.3)


def test_a_channel_of_the_caller_stays_open(fake: FakeServer) -> None:
    with grpc.insecure_channel(fake.target) as channel:
        with Client(channel=channel) as client:
            client.server_info()
        assert Client(channel=channel).server_info().version == "0.1.0"


def test_one_client_serves_many_threads(fake: FakeServer) -> None:
    answers: list[str] = []
    with Client(fake.target) as client:
        threads = [
            threading.Thread(target=lambda: answers.append(client.generate("hi").text)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [TEXT] * 8
