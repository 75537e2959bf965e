"""Requests of hostile shapes, through either port: long, deep or of many parts, within limits and beyond.

Each is bytes, made beforehand, so that who sends them takes little of the processors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyhats.v1 import generation_pb2

LENGTH = 100_000
"""Characters of a text."""
NUM_TURNS = 1024
"""Messages of the longest conversation that is taken."""


_METHODS = {
    "/v1/chat/completions": "ChatCompletions",
    "/v1/completions": "Completions",
    "/tokenize": "Tokenize",
    "/detokenize": "Detokenize",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A request as bytes.

    Attributes:
        path: gRPC's method, or HTTP's path.
        body: what is sent there.
    """

    path: str
    body: bytes

    @property
    def is_http(self) -> bool:
        """Whether it is for the HTTP port."""
        return self.path.startswith("/")

    @property
    def method(self) -> str:
        """What the server calls it."""
        return _METHODS.get(self.path) or self.path.rpartition("/")[2]


def repeated(text: str, length: int = LENGTH) -> str:
    """A text over and over, cut to a length."""
    return (text * (length // len(text) + 1))[:length]


def _pseudo_random(length: int) -> str:
    """Letters without an order, always the same."""
    state, letters = 1, []
    for _ in range(length):
        state = (1103515245 * state + 12345) % 2**31
        letters.append(chr(97 + (state >> 16) % 26))
    return "".join(letters)


TEXTS: Mapping[str, Callable[[], str]] = {
    "one letter": lambda: "a" * LENGTH,
    "one word of any letters": lambda: _pseudo_random(LENGTH),
    "spaces": lambda: " " * LENGTH,
    "line ends": lambda: repeated("\n \t\r\n", LENGTH),
    "families": lambda: repeated("👩\u200d👩\u200d👧\u200d👦", LENGTH),
    "accents on one letter": lambda: "e" + repeated("\u0301\u0327\u0323", LENGTH - 1),
    "Chinese": lambda: repeated("的一是不了人我在有他这为之大来以个中上们", LENGTH),
    "digits": lambda: repeated("8675309", LENGTH),
    "special tokens": lambda: repeated("<|im_start|><|im_end|>", LENGTH),
    "almost special tokens": lambda: repeated("<|im_start|<|im_en", LENGTH),
    "brackets": lambda: repeated('[{"a":', LENGTH),
}

_SHORT = {"max_new_tokens": 1}


def text_shapes(text: str) -> list[Shape]:
    """A text as a prompt, a conversation and something to tokenize."""
    chat = {"messages": [{"role": "user", "content": text}]}
    return [
        _grpc("Generate", generation_pb2.GenerateRequest(text=text, stopping=_SHORT)),
        _grpc("Generate", generation_pb2.GenerateRequest(chat=chat, stopping=_SHORT)),
        _grpc("Tokenize", generation_pb2.TokenizeRequest(text=text)),
        _http("/v1/chat/completions", **chat, max_tokens=1),
        _http("/v1/completions", prompt=text, max_tokens=1),
        _http("/tokenize", prompt=text),
    ]


def turns() -> list[Shape]:
    """As many turns as a conversation may have, and ten times as many."""
    shapes = []
    for number in (NUM_TURNS, 10 * NUM_TURNS):
        messages = [
            {"role": ("user", "assistant")[index % 2], "content": "word " * 20} for index in range(number)
        ]
        chat = {"messages": messages}
        shapes += [
            _grpc("Generate", generation_pb2.GenerateRequest(chat=chat, stopping=_SHORT)),
            _http("/v1/chat/completions", messages=messages, max_tokens=1),
        ]
    return shapes


def calls() -> list[Shape]:
    """Conversations of nothing but calls of tools, with the deepest arguments."""
    arguments = json.dumps(_nested(28))
    grpc_messages, http_messages = [], []
    for index in range(NUM_TURNS):
        call = {"name": "look", "arguments": arguments, "id": str(index)}
        grpc_messages.append({"role": "assistant", "tool_calls": [call]})
        function = {"name": "look", "arguments": arguments}
        http_messages.append({"role": "assistant", "tool_calls": [{"id": str(index), "function": function}]})
    return [
        _grpc("Generate", generation_pb2.GenerateRequest(chat={"messages": grpc_messages}, stopping=_SHORT)),
        _http("/v1/chat/completions", messages=http_messages, max_tokens=1),
    ]


def tools() -> list[Shape]:
    """Tools whose schemas are deep, wide, and as many as there may be."""
    user = [{"role": "user", "content": "Hello"}]
    shapes = []
    for parameters in (
        {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(5000)}},
        {"type": "object", "properties": {"deep": _nested_schema(14)}},
        {"type": "object", "properties": {"one": {"enum": [f"value {index}" for index in range(9000)]}}},
    ):
        given = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        chat = {"messages": user, "tools": [json.dumps(each) for each in given]}
        shapes += [
            _grpc("Generate", generation_pb2.GenerateRequest(chat=chat, stopping=_SHORT)),
            _http("/v1/chat/completions", messages=user, tools=given, max_tokens=1),
        ]
    small = {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(60)}}
    many = [{"type": "function", "function": {"name": f"f{n}", "parameters": small}} for n in range(128)]
    return [*shapes, _http("/v1/chat/completions", messages=user, tools=many, max_tokens=1)]


def schemas() -> list[Shape]:
    """Constraints up to their limits: compiled in a process of their own, read and checked here."""
    wide = {"type": "object", "properties": {f"p{index}": {"type": "integer"} for index in range(2000)}}
    sources: Sequence[Mapping[str, Any]] = [
        {"json_schema": json.dumps(wide)},
        {"json_schema": json.dumps(_nested_schema(14))},
        {"regex": "(" + "|".join(f"word{index}" for index in range(6000)) + ")"},
        {"choice": {"options": [f"{index:04} " + "x" * 40 for index in range(1024)]}},
        {"grammar": "start: a0\n" + "\n".join(f"a{n}: a{n + 1}" for n in range(3000)) + '\na3000: "a"'},
    ]
    shapes = [
        _grpc("Generate", generation_pb2.GenerateRequest(text="a", stopping=_SHORT, **source))
        for source in sources
    ]
    guided = {"guided_json": wide}, {"guided_regex": sources[2]["regex"]}, {"guided_json": _nested_schema(14)}
    return [*shapes, *(_http("/v1/completions", prompt="a", max_tokens=1, **each) for each in guided)]


def options() -> list[Shape]:
    """Stops and biases, as many as are taken and many more."""
    shapes = []
    for number in (16, 1000, 30_000):
        stops = [f"{index:06}" * 40 for index in range(min(number, 8_000))]
        shapes.append(
            _grpc(
                "Generate",
                generation_pb2.GenerateRequest(
                    text="a", stopping={"stop_sequences": stops, "max_new_tokens": 8}
                ),
            )
        )
        shapes.append(_http("/v1/completions", prompt="a", max_tokens=8, stop=stops))
    for number in (1024, 15_000, 100_000):
        bias = dict.fromkeys(range(number), 1.0)
        shapes.append(
            _grpc(
                "Generate",
                generation_pb2.GenerateRequest(text="a", stopping=_SHORT, sampling={"logit_bias": bias}),
            )
        )
        shapes.append(_http("/v1/completions", prompt="a", max_tokens=1, logit_bias=bias))
    return shapes


def ids() -> list[Shape]:
    """Token ids, as many as fit into a message."""
    many = [1000 + index % 40_000 for index in range(650_000)]
    return [
        _grpc("Generate", generation_pb2.GenerateRequest(token_ids={"ids": many}, stopping=_SHORT)),
        _grpc("Tokenize", generation_pb2.TokenizeRequest(token_ids={"ids": many[:250_000]})),
        _http("/v1/completions", prompt=many, max_tokens=1),
        _http("/detokenize", tokens=many[:250_000]),
    ]


def several() -> list[Shape]:
    """Many prompts, continuations and texts in one call."""
    texts = [f"text {index} " + "word " * 40 for index in range(1024)]
    continuations = [{"text": text} for text in texts]
    return [
        _grpc("Score", generation_pb2.ScoreRequest(text="a", continuations=continuations)),
        _http("/v1/completions", prompt=texts[:256], max_tokens=1),
        _http("/v1/completions", prompt=texts, max_tokens=1),
    ]


def answers() -> list[Shape]:
    """Answers with as much beside their text as there is."""
    response = {"logprobs": True, "top_logprobs": 100, "prompt_logprobs": True}
    prompt = [1000 + index for index in range(1500)]
    long = {"max_new_tokens": 300, "ignore_eos": True}
    return [
        _grpc(
            "Generate",
            generation_pb2.GenerateRequest(token_ids={"ids": prompt}, stopping=_SHORT, response=response),
        ),
        _grpc(
            "Generate",
            generation_pb2.GenerateRequest(
                text="a", stopping=long, response={"logprobs": True, "top_logprobs": 100}
            ),
        ),
        _http("/v1/completions", prompt=prompt, max_tokens=1, prompt_logprobs=20, logprobs=20),
        _http("/v1/completions", prompt="a", max_tokens=300, ignore_eos=True, logprobs=20),
    ]


SHAPES: Mapping[str, Callable[[], Sequence[Shape]]] = {
    **{name: (lambda make=make: text_shapes(make())) for name, make in TEXTS.items()},
    "turns": turns,
    "calls": calls,
    "tools": tools,
    "schemas": schemas,
    "options": options,
    "ids": ids,
    "several": several,
    "answers": answers,
}


def _nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def _nested_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def _grpc(method: str, message: Any) -> Shape:
    return Shape(f"manyhats.v1.GenerationService/{method}", message.SerializeToString())


def _http(path: str, **body: Any) -> Shape:
    return Shape(path, json.dumps(body).encode())
