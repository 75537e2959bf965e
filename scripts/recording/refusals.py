"""Calls that are refused, each with the status, reason and message it comes back with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import torch

from manyhats.client import Client, ManyhatsError
from manyhats.client.status import error_from_call
from manyhats.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc
from recording.exact import Recorded, exact
from support.factories.adapters import lora_config, lora_tensors, make_base, write_adapter


def outcome(call: Callable[..., object], *args: object, **options: object) -> Recorded:
    """What a call gives, or the error that it raises."""
    try:
        return exact(call(*args, **options))
    except (ManyhatsError, grpc.RpcError) as raised:
        failed: Any = raised
        error = failed if isinstance(raised, ManyhatsError) else error_from_call(failed, "the server")
        return {
            "code": error.code,
            "reason": error.reason,
            "message": error.message,
            "metadata": exact(error.metadata),
            "violations": exact(getattr(error, "violations", {})),
        }


def record_refusals(client: Client, address: str, adapters: Path) -> dict[str, Recorded]:
    """Name of a bad call → its outcome. ``lora`` is a task."""
    calls = {**_bad_prompts(client), **_bad_options(client), **_bad_names(client)}
    found = {name: outcome(call) for name, call in calls.items()}
    for name in write_bad_adapters(adapters / "bad"):
        found[f"adapter: {name}"] = outcome(client.register_adapter, "bad", f"bad/{name}")
    with grpc.insecure_channel(address) as channel:
        found |= {name: outcome(call) for name, call in _bad_messages(channel)}
    return found


def _bad_prompts(client: Client) -> dict[str, Callable[[], object]]:
    return {
        "empty text": lambda: client.generate("", add_special_tokens=False),
        "no token ids": lambda: client.generate([]),
        "token id outside": lambda: client.generate([5, 320]),
        "prompt too long": lambda: client.generate([5] * 600),
        "text too long": lambda: client.generate("x" * 100_000),
        "prompt and answer too long": lambda: client.generate([5] * 500, max_new_tokens=100).text,
        "role unknown": lambda: client.generate([{"role": "", "content": "hi"}]),
        "no such task": lambda: client.generate("hi", task_id="nobody"),
        "no such version": lambda: client.generate("hi", task_id="lora@9"),
        "malformed task": lambda: client.generate("hi", task_id="LoRA!"),
        "malformed version": lambda: client.generate("hi", task_id="lora@x"),
        "no continuations": lambda: client.score("hi", []),
        "empty continuation": lambda: client.score("hi", [""]),
        "continuation outside": lambda: client.score("hi", [[400]]),
        "too many continuations": lambda: client.score("hi", [[5]] * 1025),
        "tokenize for no task": lambda: client.tokenize("hi", task_id="nobody"),
    }


def _bad_options(client: Client) -> dict[str, Callable[[], object]]:
    options: dict[str, Any] = {
        "temperature": -1.0,
        "top_p": 0.0,
        "min_p": 1.5,
        "typical_p": float("nan"),
        "repetition_penalty": 0.0,
        "presence_penalty": 101.0,
        "frequency_penalty": float("inf"),
        "logit_bias": {5: 1e6},
        "max_new_tokens": 0,
        "min_new_tokens": 300,
        "stop_sequences": [""],
        "stop_token_ids": list(range(257)),
        "time_limit_ms": -5.0,
        "top_logprobs": 101,
        "top_k": -1,
        "request_id": "x" * 500,
        "cache_salt": "x" * 5000,
    }
    calls: dict[str, Callable[[], object]] = {
        f"option {name}": partial(client.generate, "hi", **{name: value}) for name, value in options.items()
    }
    everything = dict.fromkeys(range(320), -1e4)
    calls["option logit_bias outside"] = lambda: client.generate("hi", logit_bias={320: 1.0})
    calls["option stop_token_ids outside"] = lambda: client.generate("hi", stop_token_ids=[320])
    calls["every token biased"] = lambda: (
        client.generate("hi", logit_bias=everything, temperature=0.0, max_new_tokens=2).text
    )
    return calls


def _bad_names(client: Client) -> dict[str, Callable[[], object]]:
    return {
        "register without a task": lambda: client.register_adapter("", "llama/lora"),
        "register as a version": lambda: client.register_adapter("lora@1", "llama/lora"),
        "register nothing": lambda: client.register_adapter("new"),
        "register what is not there": lambda: client.register_adapter("new", "llama/none"),
        "register what is outside": lambda: client.register_adapter("new", "/etc"),
        "register by a URL": lambda: client.register_adapter("new", "https://example.org/a"),
        "register with another digest": lambda: client.register_adapter(
            "new", "llama/lora", expected_digest="sha256:" + "0" * 64
        ),
        "register with a malformed digest": lambda: client.register_adapter(
            "new", "llama/lora", expected_digest="0"
        ),
        "register with malformed labels": lambda: client.register_adapter(
            "new", "llama/lora", labels={"": "x" * 1000}
        ),
        "compose of nothing there": lambda: client.register_adapter("new", parts=[("llama/none", 1.0)]),
        "compose of too many": lambda: client.register_adapter("new", parts=[("llama/lora", 1.0)] * 17),
        "compose with no weight": lambda: client.register_adapter(
            "new", parts=[("llama/lora", float("nan"))]
        ),
        "compose of prefixes": lambda: client.register_adapter(
            "new", parts=[("llama/prefix", 0.5), ("llama/multitask", 0.5)]
        ),
        "get nobody": lambda: client.get_adapter("nobody"),
        "activate nobody": lambda: client.activate_adapter("nobody@1"),
        "activate without a version": lambda: client.activate_adapter("lora"),
        "delete nobody": lambda: client.delete_adapter("nobody"),
        "delete no version": lambda: client.delete_adapter("lora@9"),
        "list of a malformed task": lambda: list(client.list_adapters(task_id="LoRA!")),
    }


def write_bad_adapters(directory: Path) -> list[str]:
    """Write directories that no server takes, and give their names."""
    base = make_base(
        hidden_size=64, intermediate_size=128, vocab_size=320, names=("test/tiny",), is_tied=False
    )
    config, tensors = lora_config(base, rank=4), lora_tensors(base, rank=4)
    name = min(tensors)
    zeros = {key: torch.zeros_like(value) for key, value in tensors.items()}
    nan = torch.full_like(tensors[name], float("nan"))
    bad: Mapping[str, tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]] = {
        "no effect": (config, zeros),
        "not finite": (config, {**tensors, name: nan}),
        "wrong shape": (config, {**tensors, name: tensors[name][:, :5].contiguous()}),
        "tensor missing": (config, {key: value for key, value in tensors.items() if key != name}),
        "tensor unknown": (config, {**tensors, "other": zeros[name]}),
        "other base": ({**config, "base_model_name_or_path": "other/model"}, tensors),
        "other rank": ({**config, "r": 5}, tensors),
        "other type": ({**config, "peft_type": "LOHA"}, tensors),
        "bias": ({**config, "bias": "all"}, tensors),
        "rank too large": (lora_config(base, rank=300), lora_tensors(base, rank=300)),
    }
    for each, (its_config, its_tensors) in bad.items():
        write_adapter(directory / each, its_config, its_tensors)
    texts = {"no object": "[]", "no JSON": "{", "no fields": "{}", "too deep": "[" * 5000}
    for each, text in texts.items():
        write_adapter(directory / each, config, tensors)
        (directory / each / "adapter_config.json").write_text(text)
    write_adapter(directory / "only a pickle", config, tensors)
    (directory / "only a pickle" / "adapter_model.safetensors").rename(
        directory / "only a pickle" / "adapter_model.bin"
    )
    write_adapter(directory / "cut off", config, tensors)
    weights = directory / "cut off" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (directory / "empty").mkdir()
    (directory / "only config").mkdir()
    (directory / "only config" / "adapter_config.json").write_text(json.dumps(config))
    return sorted(path.name for path in directory.iterdir())


def _bad_messages(channel: grpc.Channel) -> Iterator[tuple[str, Callable[[], object]]]:
    """Messages that the client would not send."""
    adapters: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
    generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)
    yield "no prompt", lambda: generation.Generate(generation_pb2.GenerateRequest())
    yield "no prompt to score", lambda: generation.Score(generation_pb2.ScoreRequest())
    yield "bad page token", lambda: adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(page_token="x"))
    file = {"name": "adapter_config.json", "size_bytes": 4, "sha256": "0" * 64}
    uploads: Mapping[str, list[dict[str, Any]]] = {
        "nothing": [],
        "no header": [{"chunk": {"data": b"{}"}}],
        "no files": [{"header": {"task_id": "new"}}],
        "file of no name": [{"header": {"task_id": "new", "files": [{**file, "name": "../x"}]}}],
        "too large": [{"header": {"task_id": "new", "files": [{**file, "size_bytes": 2**60}]}}],
        "two headers": [{"header": {"task_id": "new", "files": [file]}}] * 2,
        "gap": [{"header": {"task_id": "new", "files": [file]}}, {"chunk": {"offset": 2, "data": b"ab"}}],
        "other bytes": [{"header": {"task_id": "new", "files": [file]}}, {"chunk": {"data": b"abcd"}}],
        "too few bytes": [{"header": {"task_id": "new", "files": [file]}}, {"chunk": {"data": b"ab"}}],
    }
    for name, messages in uploads.items():
        sent = [adapter_pb2.UploadAdapterRequest(**each) for each in messages]
        yield f"upload: {name}", partial(lambda sent: adapters.UploadAdapter(iter(sent)), sent)
