"""Nothing of a prompt is logged, whatever becomes of it; and of an exception, where it was raised."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manyhats.server.observability.logs import LogFormat, configure_logs
from manyhats.server.observability.tracebacks import HIDDEN, without_messages
from manyhats.v1 import encoding_pb2
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import Running, refused, running_server
from support.harnesses.http import exchange, head, request

SECRET = "the quick brown fox"


def talk(**fields: Any) -> dict[str, Any]:
    return {"model": "", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 3, **fields}


async def say_everything(server: Running) -> None:
    """Prompts in every place, answered and refused, through both ports."""
    for path, body in (
        ("/v1/chat/completions", talk()),
        ("/v1/chat/completions", talk(stream=True)),
        ("/v1/chat/completions", talk(messages=[{"role": "refused", "content": SECRET}])),
        ("/v1/chat/completions", talk(messages=SECRET)),
        ("/v1/chat/completions", talk(max_tokens=SECRET)),
        ("/v1/chat/completions", talk(prompt=SECRET)),
        ("/v1/chat/completions", talk(stop=[SECRET] * 99)),
        ("/v1/completions", {"prompt": SECRET}),
        ("/v1/completions", {"prompt": SECRET * 1000}),
        ("/v1/completions", {"prompt": [SECRET, ""], "echo": True, "max_tokens": 0}),
        ("/v1/responses", {"input": SECRET, "instructions": SECRET}),
        ("/v1/score", {"prompt": SECRET, "continuations": [SECRET]}),
        ("/v1/embeddings", {"input": SECRET}),
        ("/v1/rerank", {"query": SECRET, "documents": [SECRET]}),
        ("/tokenize", {"prompt": SECRET}),
        ("/v1/completions", f'{{"prompt": "{SECRET}"'),
    ):
        await exchange(server.http, request(path, body))
    await exchange(server.http, head("/v1/completions", 3) + SECRET.encode())
    ask = server.generation
    await ask.Generate(pb.GenerateRequest(text=SECRET))
    await refused(ask.Generate(pb.GenerateRequest(text=SECRET * 1000)))
    await ask.Score(pb.ScoreRequest(text=SECRET, continuations=[pb.Continuation(text=SECRET)]))
    await ask.Tokenize(pb.TokenizeRequest(text=SECRET))
    texts = [encoding_pb2.TextInput(text=SECRET)]
    await server.encoding.Embed(encoding_pb2.EmbedRequest(inputs=texts))
    server.engine.error = ValueError(f"cannot read {SECRET!r}")  # what a bug may say
    await refused(ask.Generate(pb.GenerateRequest(text=SECRET)))
    await exchange(server.http, request("/v1/chat/completions", talk()))


@pytest.mark.usefixtures("own_logs")
@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_nothing_of_a_prompt_is_logged(
    log_format: LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs(log_format, "info")
    async with running_server() as server:
        await say_everything(server)
    log = capsys.readouterr().err
    assert log.count("unexpected error") == 2
    assert log.count("ValueError") == 2
    assert HIDDEN in log
    assert log.count("ChatCompletions") >= 8
    for word in SECRET.split():
        assert word not in log


@pytest.mark.usefixtures("own_logs")
async def test_who_asks_for_all_of_it_gets_what_exceptions_say(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "debug")
    async with running_server() as server:
        server.engine.error = ValueError(f"cannot read {SECRET!r}")
        await refused(server.generation.Generate(pb.GenerateRequest(text=SECRET)))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["event"] == "unexpected error"]
    assert line["exception"].endswith(f"ValueError: cannot read {SECRET!r}")


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as found:  # noqa: BLE001
        return found


def test_a_traceback_names_types_and_lines_of_all_that_led_to_it() -> None:
    cause = raised(KeyError(SECRET))
    text = without_messages(raised(RuntimeError(SECRET), cause))
    assert SECRET not in text
    assert (
        text.index("builtins.KeyError: (hidden") < text.index("led to:") < text.index("builtins.RuntimeError")
    )
    assert text.count("raise error from cause") == 2


def test_an_exception_during_another_is_told_unless_that_is_suppressed() -> None:
    def during(is_suppressed: bool) -> BaseException:
        try:
            try:
                raise KeyError(SECRET)
            except KeyError:
                if is_suppressed:
                    raise ValueError(SECRET) from None
                raise ValueError(SECRET)  # noqa: B904
        except ValueError as found:
            return found

    assert "KeyError" in without_messages(during(False))
    assert "KeyError" not in without_messages(during(True)).replace("except KeyError", "")


def test_groups_and_circles_end_and_what_the_system_says_is_shown() -> None:
    group = ExceptionGroup(SECRET, [ValueError(SECRET), OSError(28, "No space left on device", SECRET)])
    text = without_messages(group)
    assert "builtins.ExceptionGroup" in text
    assert "builtins.OSError: No space left on device" in text
    assert SECRET not in text
    first, second = ValueError(SECRET), KeyError(SECRET)
    first.__cause__, second.__cause__ = second, first
    assert without_messages(first).count("builtins.") == 2
    assert SECRET not in without_messages(OSError(SECRET))
