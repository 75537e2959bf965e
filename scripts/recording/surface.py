"""What others rely on by name: commands and flags, metrics, and the raw logits behind all tokens."""

from __future__ import annotations

import hashlib
import re
import urllib.request
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from recording.exact import Recorded

# Has series only where an adapter was no longer in memory when it was asked for.
_BY_CHANCE = "manyhats_adapter_load_seconds"


def record_commands() -> dict[str, Recorded]:
    """Command → the names of its parameters."""
    typer: Any = import_module("typer.main")
    found: dict[str, Recorded] = {}

    def walk(command: Any, name: str) -> None:
        names = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        found[name] = dict.fromkeys(sorted(names), True)
        for child, each in getattr(command, "commands", {}).items():
            walk(each, f"{name} {child}")

    walk(typer.get_command(import_module("manyhats.cli.main").app), "manyhats")
    return found


def record_metrics(address: str) -> dict[str, Recorded]:
    """Metric → its type and help; series, by its labels' names → true.

    Neither values nor labels' values, which come with the first event of their kind.
    """
    with urllib.request.urlopen(f"http://{address}/metrics") as response:
        lines = response.read().decode().splitlines()
    found: dict[str, Recorded] = {}
    for line in lines:
        if line.startswith("#"):
            _, kind, name, text = line.split(" ", 3)
            found[f"{name} {kind.lower()}"] = text
        elif not line.startswith(_BY_CHANCE):
            found[re.sub(r'="[^"]*"', "", line.rpartition(" ")[0])] = True
    return found


def record_logits(models: Mapping[str, Path]) -> Recorded:
    """SHA-256 of the logits at all positions of two prompts, one in chunks beside the other, on each model.

    The one place that reaches into the engine, through the harness of its tests.
    """
    engine: Any = import_module("support.harnesses.engine")
    prompts = [engine.Prompt(list(range(3, 3 + length))) for length in (70, 9)]
    found: dict[str, Recorded] = {}
    for name, model in models.items():
        for quantization in ("none", "nf4"):
            runner = engine.Runner(engine.load_tiny(model, quantization))
            for prompt, ran in zip(prompts, runner.run(prompts, max_tokens=32, all_logits=True), strict=True):
                key = f"{name}, {quantization}, {len(prompt.token_ids)} tokens"
                found[key] = hashlib.sha256(ran.stacked.numpy().tobytes()).hexdigest()
    return found
