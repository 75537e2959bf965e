"""What callers are told of a body that is not what the route reads."""

from __future__ import annotations

import json

import pytest

from manyhats.engine.errors import FieldInvalidError
from manyhats.server.http.body import decoded
from manyhats.server.http.openai_messages import ChatBody, CompletionBody


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"prompt": "a", "logit_bias": {"a": 1}}', "logit_bias"),
        ('{"prompt": "a", "stop": ["b", 1]}', "stop[1]"),
        ('{"prompt": "a", "stream_options": {"nonsense": 1}}', "stream_options.nonsense"),
        ('{"stop": "a"}', "prompt"),
        ('{"prompt": "a"', "body"),
        ('{"user": ' + "[" * 100_000, "body"),
        ("[]", "body"),
    ],
)
def test_the_field_is_named(body: str, field: str) -> None:
    with pytest.raises(FieldInvalidError) as caught:
        decoded(body.encode(), CompletionBody)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "body: is empty; it must be a JSON object"),
        ("[]", "body: must be an object, not an array"),
        ('{"prompt": "a", "n": "b"}', "n: must be an integer, not a string"),
        ('{"prompt": "a", "temperature": "b"}', "temperature: must be a number, not a string"),
        ('{"prompt": "a", "stop": 1}', "stop: must be a string or an array, not an integer"),
        ('{"prompt": "a", "user": 1, "echo": 1}', "echo: must be a boolean, not an integer"),
        ('{"prompt": null}', "prompt: must be a string or an array, not null"),
    ],
)
def test_types_have_the_names_that_json_gives_them(body: str, message: str) -> None:
    with pytest.raises(FieldInvalidError) as caught:
        decoded(body.encode(), CompletionBody)
    assert str(caught.value) == message


def test_unknown_fields_may_be_ignored_wherever_they_are() -> None:
    ignored: list[str] = []
    body = (
        b'{"prompt": "a", "x": 1, "stream": true, "stream_options": {"y": {"z": 2}, "include_usage": true}}'
    )
    found = decoded(body, CompletionBody, ignored.append)
    assert ignored == ["x", "stream_options.y"]
    assert found.stream_options is not None
    assert found.stream_options.include_usage


def test_an_unknown_field_of_many_messages_is_ignored_at_once() -> None:
    ignored: list[str] = []
    message = {"role": "user", "content": [{"type": "text", "text": "a", "y": 1}], "x": 1}
    plain = {"role": "user", "content": "a"}
    found = decoded(json.dumps({"messages": [plain, *[message] * 50]}).encode(), ChatBody, ignored.append)
    assert ignored == ["messages[1].content[0].y", "messages[1].x"]
    assert len(found.messages) == 51


def test_too_many_unknown_fields_are_not_ignored() -> None:
    body = json.dumps({"prompt": "a", **{f"x{index}": 1 for index in range(40)}}).encode()
    with pytest.raises(FieldInvalidError, match="32 or more unknown fields"):
        decoded(body, CompletionBody, lambda name: None)


@pytest.mark.parametrize("name", ["x` - at `$.stop", "x` - at `$.stop[0]", "x` - at `$.none", "`", ""])
def test_an_unknown_name_that_looks_like_a_place_is_an_error_of_the_body(name: str) -> None:
    ignored: list[str] = []
    try:
        decoded(b'{"prompt": "a", "stop": ["b"], "%b": 1}' % name.encode(), CompletionBody, ignored.append)
    except FieldInvalidError:
        assert ignored == []
    else:
        assert ignored == [name]
