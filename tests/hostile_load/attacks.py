"""What callers do to a server in ill will or by mistake; run as a process, makes the calls of one kind for a while."""

from __future__ import annotations

import argparse
import json
import random
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from http.client import HTTPConnection
from typing import Any

import grpc

from hostile_load.shapes import SHAPES, Shape
from manyhats.client import Client
from manyhats.v1 import adapter_pb2, generation_pb2, generation_pb2_grpc

NUM_TASKS = 24
"""Tasks ``task00`` … of LoRA that an attack asks for at once."""
NUM_VIRTUAL_TASKS = 6
"""Tasks ``virtual0`` … of virtual tokens."""


class Attacker:
    """Makes the calls of one kind of attack after the other, each from a channel of its own process."""

    def __init__(self, target: str, http: str, seed: int) -> None:
        self._target = target
        self._http = http
        self._random = random.Random(seed)
        self._shapes: dict[str, Sequence[Shape]] = {}
        self._channel = grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", 1 << 28)])
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        with Client(target) as client:
            self._info = client.server_info()

    def run(self, kind: str, seconds: float) -> Counter[str]:
        """Attack for a while; the calls by method and status."""
        attack = ATTACKS[kind]
        statuses: Counter[str] = Counter()
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            statuses.update(attack(self))
        return statuses

    def wrong_ids(self) -> Iterator[str]:
        """Ids that are no token, and stops that leave nothing to say."""
        vocab = self._info.vocab_size
        bad = self._random.choice([vocab, vocab + 1, 2**31 - 1, 2**31, 2**32 - 1])
        good = [self._random.randrange(vocab) for _ in range(8)]
        requests = [
            {"token_ids": {"ids": [*good, bad]}},
            {"text": "a", "sampling": {"logit_bias": {bad: 1.0}}},
            {"text": "a", "stopping": {"stop_token_ids": [bad], "min_new_tokens": 3, "max_new_tokens": 4}},
            {
                "text": "a",
                "stopping": {"stop_token_ids": good, "min_new_tokens": 3, "max_new_tokens": 4},
                "sampling": {"temperature": 100.0, "logit_bias": dict.fromkeys(good, -1e4), "top_p": 1e-6},
            },
            {
                "chat": {"messages": [{"role": "\x00", "content": "<|im_end|>" * 50}]},
                "stopping": {"max_new_tokens": 2},
            },
        ]
        for fields in requests:
            yield self._call("Generate", generation_pb2.GenerateRequest(**fields))
        score = {"text": "a", "continuations": [{"token_ids": {"ids": [bad]}}]}
        yield self._call("Score", generation_pb2.ScoreRequest(**score))

    def virtual_tokens(self) -> Iterator[str]:
        """Tasks of many virtual tokens at once, in a pool that has room for few of them."""
        yield from self._together(
            lambda index: generation_pb2.GenerateRequest(
                text="Once", task_id=f"virtual{index % NUM_VIRTUAL_TASKS}", stopping={"max_new_tokens": 4}
            ),
            12,
        )

    def long_texts(self) -> Iterator[str]:
        """Texts of up to a mebibyte, most of which cannot fit."""
        size = self._random.choice([30_000, 200_000, 1 << 20])
        text = "".join(self._random.choice(["a ", "the ", "\n", "é", "123 "]) for _ in range(size // 3))[
            :size
        ]
        few = {"max_new_tokens": 1}
        yield self._call("Generate", generation_pb2.GenerateRequest(text=text, stopping=few))
        yield self._call("Tokenize", generation_pb2.TokenizeRequest(text=text))
        chat = {"messages": [{"role": "user", "content": text}]}
        yield self._call("Generate", generation_pb2.GenerateRequest(chat=chat, stopping=few))
        score = generation_pb2.ScoreRequest(text=text, continuations=[{"text": " a"}])
        yield self._call("Score", score)

    def large_scores(self) -> Iterator[str]:
        """Many long continuations in one scoring, within the bounds and beyond them."""
        length, number = self._random.choice([(50, 200), (1000, 10), (1000, 1000)])
        ids = [self._random.randrange(self._info.vocab_size) for _ in range(length)]
        continuations = [{"token_ids": {"ids": ids}}] * number
        request = generation_pb2.ScoreRequest(text="a", continuations=continuations)
        yield self._call("Score", request, timeout_s=30.0)

    def unread_streams(self) -> Iterator[str]:
        """Streams with as much beside the text as there is, which nobody reads; given up in the end."""
        options = generation_pb2.ResponseOptions(logprobs=True, top_logprobs=100)
        request = generation_pb2.GenerateRequest(
            text="Once", response=options, stopping={"max_new_tokens": 3000, "ignore_eos": True}
        )
        calls = [self._stub.GenerateStream(request) for _ in range(4)]
        for call in calls:
            with suppress(grpc.RpcError):
                next(call)
        time.sleep(8.0)
        for call in calls:
            call.cancel()
            yield f"GenerateStream {call.code().name}"

    def prompt_logprobs(self) -> Iterator[str]:
        """Log-probabilities of each token of a long prompt, with the hundred most likely ones."""
        ids = [self._random.randrange(self._info.vocab_size) for _ in range(1500)]
        request = generation_pb2.GenerateRequest(
            token_ids={"ids": ids},
            stopping={"max_new_tokens": 1},
            response={"prompt_logprobs": True, "logprobs": True, "top_logprobs": 100},
        )
        yield self._call("Generate", request, timeout_s=60.0)

    def cold_tasks(self) -> Iterator[str]:
        """More tasks at once than there are slots."""
        yield from self._together(
            lambda index: generation_pb2.GenerateRequest(
                text="Once", task_id=f"task{index:02}", stopping={"max_new_tokens": 2}
            ),
            NUM_TASKS,
        )

    def connections(self) -> Iterator[str]:
        """Hundreds of connections that say nothing, some that drip, and bursts of probes."""
        with ExitStack() as stack:
            for address in (self._target, self._http):
                host, _, port = address.rpartition(":")
                for _ in range(550):
                    with suppress(OSError):
                        stack.enter_context(socket.create_connection((host, int(port)), timeout=2.0))
            host, _, port = self._http.rpartition(":")
            drips = []
            for _ in range(20):
                with suppress(OSError):
                    drips.append(
                        stack.enter_context(socket.create_connection((host, int(port)), timeout=2.0))
                    )
            for letter in b"GET /metrics HTTP/1.1\r\nX: ":
                for drip in drips:
                    with suppress(OSError):
                        drip.send(bytes([letter]))
                time.sleep(0.1)
        return
        yield ""

    def no_messages(self) -> Iterator[str]:
        """Bytes that are no message, of every method."""
        rubbish = self._random.randbytes(self._random.randrange(1, 200)) + b"\xff"
        for name in ("Generate", "Score", "Tokenize"):
            yield self._call(name, rubbish)
        yield self._call("UploadAdapter", rubbish, service="AdapterService")
        yield self._call("ListAdapters", rubbish, service="AdapterService")

    def floods(self) -> Iterator[str]:
        """A thousand calls at once."""
        request = generation_pb2.GenerateRequest(text="Once", stopping={"max_new_tokens": 2})
        yield from self._together(lambda index: request, 1000)

    def given_up_calls(self) -> Iterator[str]:
        """Calls that their callers give up at some moment, or give too little time."""
        request = generation_pb2.GenerateRequest(
            text="Once upon a time", stopping={"max_new_tokens": 200, "ignore_eos": True}
        )
        calls = [self._stub.GenerateStream(request) for _ in range(4)]
        time.sleep(self._random.uniform(0.0, 0.5))
        for call in calls:
            call.cancel()
            yield f"GenerateStream {call.code().name}"
        yield self._call("Generate", request, timeout_s=self._random.uniform(0.001, 0.2))

    def same_bytes(self) -> Iterator[str]:
        """Tasks with the bytes of one that is in use, made and deleted again."""
        use = self._stub.GenerateStream(
            generation_pb2.GenerateRequest(
                text="Once", task_id="task00", stopping={"max_new_tokens": 30, "ignore_eos": True}
            )
        )
        name = f"twin{self._random.randrange(10**6)}"
        registration = adapter_pb2.RegisterAdapterRequest(task_id=name, uri="task00")
        for method, request in (
            ("RegisterAdapter", registration),
            ("DeleteAdapter", adapter_pb2.DeleteAdapterRequest(task_id=name)),
            ("RegisterAdapter", adapter_pb2.RegisterAdapterRequest(task_id="no/task", uri="../../etc")),
        ):
            yield self._call(method, request, service="AdapterService")
        for _ in use:
            pass
        yield f"GenerateStream {use.code().name}"

    def shapes(self, name: str) -> Iterator[str]:
        """Requests of one hostile shape, through both ports."""
        if name not in self._shapes:
            self._shapes[name] = SHAPES[name]()
        for shape in self._shapes[name]:
            yield self._posted(shape) if shape.is_http else self._call(shape.method, shape.body)

    def _posted(self, shape: Shape) -> str:
        connection = HTTPConnection(self._http, timeout=60.0)
        try:
            connection.request("POST", shape.path, shape.body, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
        except ConnectionError:  # a body over the limit is not read to its end
            return f"{shape.method} UNAVAILABLE"
        finally:
            connection.close()
        return f"{shape.method} {_CODES.get(answer.status, 'UNKNOWN')}"

    def _call(
        self, name: str, request: Any, *, service: str = "GenerationService", timeout_s: float = 60.0
    ) -> str:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        call = self._channel.unary_unary(f"/manyhats.v1.{service}/{name}")
        try:
            call(data, timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{name} {error.code().name}"
        return f"{name} OK"

    def _together(self, make: Callable[[int], generation_pb2.GenerateRequest], number: int) -> Iterator[str]:
        calls = [self._stub.Generate.future(make(index), timeout=60.0) for index in range(number)]
        for call in calls:
            with suppress(grpc.RpcError):
                call.result()
            yield f"Generate {call.code().name}"


_CODES = {
    200: "OK",
    400: "INVALID_ARGUMENT",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
ATTACKS: Mapping[str, Callable[[Attacker], Iterator[str]]] = {
    "ids that are no token": Attacker.wrong_ids,
    "virtual tokens": Attacker.virtual_tokens,
    "long texts": Attacker.long_texts,
    "large scores": Attacker.large_scores,
    "unread streams": Attacker.unread_streams,
    "prompt log-probabilities": Attacker.prompt_logprobs,
    "cold tasks": Attacker.cold_tasks,
    "connections": Attacker.connections,
    "no messages": Attacker.no_messages,
    "floods": Attacker.floods,
    "calls given up": Attacker.given_up_calls,
    "tasks of the same bytes": Attacker.same_bytes,
    **{f"shape {name}": partial(Attacker.shapes, name=name) for name in SHAPES},
}
ALLOWED = {
    "OK",
    "INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "UNAVAILABLE",
}
"""What a call may end with; INTERNAL and UNKNOWN are faults of the server."""


def main() -> None:
    """Attack, and print the statuses as JSON."""
    parser = argparse.ArgumentParser(prog="python -m hostile_load.attacks", description=__doc__)
    parser.add_argument("target", help="gRPC's HOST:PORT")
    parser.add_argument("http", help="HTTP's HOST:PORT")
    parser.add_argument("kind", choices=tuple(ATTACKS))
    parser.add_argument("--seconds", type=float, default=20.0, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    print(json.dumps(Attacker(options.target, options.http, options.seed).run(options.kind, options.seconds)))


if __name__ == "__main__":
    main()
