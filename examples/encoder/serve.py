"""Serves a small encoder with the tasks that read texts: ``make run-encoder``, or ``python -m examples.encoder.serve``.

Prints one call per task to try. Otherwise as ``examples/serve.py``.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.encoder.calls import ADAPTERS, BASE_ALIAS, EncoderCall, read_calls
from examples.serve import MANYHATS, serve

STORE = Path(__file__).resolve().parent.parent.parent / ".run" / "encoder-store"
SERVICE = "manyhats.v1.EncodingService"


def main() -> int:
    fixed = ["--model", BASE_ALIAS, "--store", str(STORE), "--adapter-root", str(ADAPTERS)]
    return serve([*fixed, *sys.argv[1:]], introduce)


def introduce(grpc: str, http: str) -> None:
    """Register the tasks, and say what to try; not if the server ends meanwhile."""
    from manyhats.client import ManyhatsError

    calls = read_calls()
    try:
        register_all(grpc, calls)
    except ManyhatsError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    print(suggestions(grpc, http, calls), flush=True)


def register_all(address: str, calls: Mapping[str, EncoderCall]) -> None:
    """Register every task with the names of its classes; again is as good as once."""
    from manyhats.client import Client

    with Client(address) as client:
        for task, call in calls.items():
            labels = {f"class.{number}": name for number, name in enumerate(call.classes)}
            client.register_adapter(task, str(ADAPTERS / task), labels=labels)


def suggestions(grpc: str, http: str, calls: Mapping[str, EncoderCall]) -> str:
    """One call per task: with this project's client, with curl where HTTP has it, and with grpcurl."""
    lines = ["", "Try, in another terminal:"]
    for task, call in calls.items():
        ways = [client_call(task, call, grpc), curl(task, call, http), grpcurl(task, call, grpc)]
        lines += ["", f"  {task}", *(f"    {way}" for way in ways if way)]
    mixed = [sys.executable, "-m", "examples.encoder.mixed_call", grpc]
    return "\n".join(
        [*lines, "", "  all of them at once", f"    {shlex.join(mixed)}", "", "Ctrl-C stops the server."]
    )


def client_call(task: str, call: EncoderCall, address: str) -> str:
    return shlex.join([str(MANYHATS), call.command, "--server", address, "--task", task, call.text])


def curl(task: str, call: EncoderCall, address: str) -> str:
    """Empty for tags, which HTTP has no call for."""
    if call.path is None:
        return ""
    body = json.dumps({"model": task, "input": call.text}, ensure_ascii=False)
    url = f"http://{address}{call.path}"
    return shlex.join(["curl", url, "-H", "content-type: application/json", "-d", body])


def grpcurl(task: str, call: EncoderCall, address: str) -> str:
    named: dict[str, Any] = {"task_ids": [task]} if call.command == "classify" else {"task_id": task}
    body = json.dumps({**named, "inputs": [{"text": call.text}]}, ensure_ascii=False)
    return shlex.join(["grpcurl", "-plaintext", "-d", body, address, f"{SERVICE}/{call.method}"])


if __name__ == "__main__":
    sys.exit(main())
