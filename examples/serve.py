"""Serves the default model with every example task, and prints one call per task to try.

Stops when interrupted: the server drains, and its exit code is this program's.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
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
    tasks = sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir())
    command = [str(MANYHATS), "serve", "--store", str(STORE), *sys.argv[1:]]
    for root in (ADAPTERS, PARTS):
        command += ["--adapter-root", str(root)]
    for task in tasks:
        command += ["--register", f"{task}={ADAPTERS / task}"]
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
        address = ready_address(line)
        if address is not None:
            introduce(address)
    return server.wait()


def introduce(address: str) -> None:
    """Register what only a running server can take, and say what to try; not if the server ends meanwhile."""
    from manyhats.client import ManyhatsError

    try:
        register_composed(address)
    except ManyhatsError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    print(calls(address), flush=True)


def register_composed(address: str) -> None:
    """Register the tasks that are made of several artifacts; again is as good as once."""
    from manyhats.client import Client

    composed: dict[str, list[dict[str, Any]]] = json.loads((HERE / "composed.json").read_text())
    with Client(address) as client:
        for task, parts in composed.items():
            client.register_adapter(task, parts=[(str(HERE / p["adapter"]), p["weight"]) for p in parts])


def ready_address(line: str) -> str | None:
    """Where gRPC listens, if the line says that the server is ready."""
    if line.startswith("ready:"):
        return line.split("gRPC on ")[1].split(",")[0]
    try:
        facts: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return str(facts["grpc"]) if facts.get("event") == "ready" else None


def calls(address: str) -> str:
    """One call per task, with this project's client and with grpcurl."""
    prompts: dict[str, dict[str, Any]] = json.loads((HERE / "prompts.json").read_text())
    lines = ["", "Try, in another terminal:"]
    for task, prompt in prompts.items():
        lines += [
            "",
            f"  {task}",
            f"    {client_call(task, prompt, address)}",
            f"    {grpcurl(task, prompt, address)}",
        ]
    lines += [
        "",
        "  all of them at once",
        f"    {shlex.join([sys.executable, '-m', 'examples.mixed_call', address])}",
    ]
    return "\n".join([*lines, "", "Ctrl-C stops the server."])


def client_call(task: str, prompt: dict[str, Any], address: str) -> str:
    words = [str(MANYHATS), "generate", "--server", address, "--task", task]
    words += ["--temperature", "0", "--max-new-tokens", str(prompt["max_new_tokens"])]
    if "chat" in prompt:
        return shlex.join([*words, "--chat", prompt["chat"]])
    return shlex.join([*words, prompt["prompt"]])


def grpcurl(task: str, prompt: dict[str, Any], address: str) -> str:
    if "chat" in prompt:
        asked: dict[str, Any] = {"chat": {"messages": [{"role": "user", "content": prompt["chat"]}]}}
    else:
        asked = {"text": prompt["prompt"]}
    request = {
        "task_id": task,
        **asked,
        "sampling": {"temperature": 0},
        "stopping": {"max_new_tokens": prompt["max_new_tokens"]},
    }
    return shlex.join(["grpcurl", "-plaintext", "-d", json.dumps(request), address, METHOD])


if __name__ == "__main__":
    sys.exit(main())
