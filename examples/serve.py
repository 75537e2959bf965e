"""Serves the default model with every example task, and prints one call per task to try.

Stops when interrupted: the server drains, and its exit code is this program's.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
ADAPTERS = HERE / "adapters"
PARTS = HERE / "parts"
STORE = HERE.parent / ".run" / "store"
MANYHATS = Path(sys.executable).with_name("manyhats")
METHOD = "manyhats.v1.GenerationService/Generate"


def main() -> int:
    roots = [argument for root in (ADAPTERS, PARTS) for argument in ("--adapter-root", str(root))]
    return serve(["--store", str(STORE), *roots, *sys.argv[1:]], introduce)


def serve(arguments: Sequence[str], introduce: Callable[[str, str], None]) -> int:
    """Run ``manyhats serve`` to its end; once it is ready, call ``introduce`` with the addresses of gRPC and HTTP."""
    command = [str(MANYHATS), "serve", *arguments]
    servers: list[subprocess.Popen[str]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not servers:
            sys.exit(128 + number)
        servers[0].send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    # In a session of its own, so that an interrupt reaches it once, through this process.
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    servers.append(server)
    for line in server.stdout or ():
        print(line, end="", flush=True)
        addresses = ready_addresses(line)
        if addresses is not None:
            introduce(*addresses)
    return server.wait()


def introduce(grpc: str, http: str) -> None:
    """Register the tasks, and say what to try; not if the server ends meanwhile."""
    from manyhats.client import ManyhatsError

    prompts: dict[str, dict[str, Any]] = json.loads((HERE / "prompts.json").read_text())
    try:
        register_all(grpc, prompts)
    except ManyhatsError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    print(calls(grpc, http, prompts), flush=True)


def register_all(address: str, prompts: dict[str, dict[str, Any]]) -> None:
    """Register every task; again is as good as once."""
    from manyhats.client import Client

    composed: dict[str, list[dict[str, Any]]] = json.loads((HERE / "composed.json").read_text())
    with Client(address) as client:
        for task, prompt in prompts.items():
            if task in composed:
                parts = [(str(HERE / part["adapter"]), part["weight"]) for part in composed[task]]
                client.register_adapter(task, parts=parts, labels=labels(prompt))
            else:
                client.register_adapter(task, str(ADAPTERS / task), labels=labels(prompt))


def labels(prompt: dict[str, Any]) -> dict[str, str]:
    """What holds for callers who say nothing else: the likeliest answer, of some length; and the classes, if any."""
    classes = {f"class.{number}": name for number, name in enumerate(prompt.get("classes", []))}
    return {"default.temperature": "0", "default.max_tokens": str(prompt["max_new_tokens"]), **classes}


def ready_addresses(line: str) -> tuple[str, str] | None:
    """Where gRPC and HTTP listen, if the line says that the server is ready."""
    if line.startswith("ready:"):
        found = re.search(r"gRPC on (\S+), HTTP on (\S+)", line)
        return None if found is None else (found[1], found[2])
    try:
        facts: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return (str(facts["grpc"]), str(facts["http"])) if facts.get("event") == "ready" else None


def calls(grpc: str, http: str, prompts: dict[str, dict[str, Any]]) -> str:
    """One call per task: with this project's client, with curl and with grpcurl."""
    lines = ["", "Try, in another terminal:"]
    for task, prompt in prompts.items():
        lines += [
            "",
            f"  {task}",
            f"    {client_call(task, prompt, grpc)}",
            f"    {curl(task, prompt, http)}",
            f"    {grpcurl(task, prompt, grpc)}",
        ]
    lines += [
        "",
        "  all of them at once",
        f"    {shlex.join([sys.executable, '-m', 'examples.mixed_call', grpc])}",
        "",
        "  side by side, in a browser",
        f"    http://{http}/",
    ]
    return "\n".join([*lines, "", "Ctrl-C stops the server."])


def client_call(task: str, prompt: dict[str, Any], address: str) -> str:
    return shlex.join(
        [str(MANYHATS), "generate", "--server", address, "--task", task, "--chat", prompt["chat"]]
    )


def curl(task: str, prompt: dict[str, Any], address: str) -> str:
    request = {"model": task, "messages": [{"role": "user", "content": prompt["chat"]}]}
    url = f"http://{address}/v1/chat/completions"
    return shlex.join(["curl", url, "-H", "content-type: application/json", "-d", json.dumps(request)])


def grpcurl(task: str, prompt: dict[str, Any], address: str) -> str:
    request = {"task_id": task, "chat": {"messages": [{"role": "user", "content": prompt["chat"]}]}}
    return shlex.join(["grpcurl", "-plaintext", "-d", json.dumps(request), address, METHOD])


if __name__ == "__main__":
    sys.exit(main())
