"""Attacks a server of the default model in every way that a caller can, while well-behaved streams go on.

``make test-hostile``, or ``python -m hostile_load`` in ``tests``. The server must live, keep answering the
well-behaved, end every call with exactly one status, count each, and hold no more memory than after its first minutes.
First each attack goes on alone, and the largest gap between two tokens of the well-behaved streams is printed in
medians of a quiet server's; then all go on together. Attackers are processes of their own, so that what they use of
an interpreter is not the streams'.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil

from hostile_load.attacks import ATTACKS, NUM_TASKS, NUM_VIRTUAL_TASKS
from hostile_load.watching import (
    Attacked,
    HostileLoadError,
    Probe,
    Server,
    Watched,
    counted,
    scraped,
    turns_over,
)
from manyhats.client import Client
from restart_under_load import describe_model, serve_command, serving
from support.factories.adapters import make_lora
from support.factories.prefixes import make_prompt

NUM_SLOTS = 8
"""Of adapters: tasks in flight are more."""
NUM_VIRTUAL_TOKENS = 700
KV_TOKENS = 8192
MAX_GROWTH_BYTES = 64 << 20
MAX_TURN_S = 0.005
"""What the event loop may take at once."""
OF_DELETED_TASKS = ("RegisterAdapter OK", "DeleteAdapter OK")
"""What the server counted of a task it forgets with the task, and each that is registered in an attack is deleted."""
GIVEN_UP = {"CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE"}


@contextmanager
def attackable(model: str, root: Path) -> Iterator[Server]:
    """A server of its own, with tasks of LoRA and of virtual tokens."""
    base = describe_model(model)
    adapters = root / "adapters"
    command = serve_command(
        root / "server.yaml",
        model=model,
        store=str(root / "store"),
        adapter_roots=[str(adapters)],
        max_adapters=NUM_SLOTS,
        kv_cache_bytes=_kv_bytes(base.num_layers),
    )
    for index in range(NUM_TASKS):
        make_lora(adapters / f"task{index:02}", base, rank=4, seed=index)
    for index in range(NUM_VIRTUAL_TASKS):
        make_prompt(adapters / f"virtual{index}", base, num_virtual_tokens=NUM_VIRTUAL_TOKENS, seed=index)
    with serving(command) as (process, ready):
        with Client(ready["grpc"]) as client:
            for directory in sorted(adapters.iterdir()):
                client.register_adapter(directory.name, directory.name)
        yield Server(psutil.Process(process.pid), ready["grpc"], ready["http"])


def _kv_bytes(num_layers: int) -> int:
    """Room for some thousand tokens of the default model: 3 heads of 64 values, keys and values, in bfloat16."""
    return KV_TOKENS * num_layers * 2 * 3 * 64 * 2


def check_memory(probes: Sequence[Probe], allowed_bytes: int) -> str:
    """The memory held in each tenth of the time, in MB: medians, since peaks are the calls of the moment.

    Raises:
        HostileLoadError: it has grown since the first four tenths.
    """
    bounds = [len(probes) * tenth // 10 for tenth in range(11)]
    held = [
        median(p.rss_bytes for p in probes[first : max(last, first + 1)]) for first, last in pairwise(bounds)
    ]
    shown = ", ".join(f"{each / 1e6:.0f}" for each in held)
    if held[-1] > max(held[:4]) + allowed_bytes:
        raise HostileLoadError(f"memory grew: {shown} MB")
    return shown


def check_idle(server: Server) -> None:
    """Check that nothing is left of any call.

    Raises:
        HostileLoadError: something is.
    """
    end_s = time.monotonic() + 60.0
    gauges = ("manyhats_requests_running", "manyhats_requests_waiting")
    while True:
        left = {
            each.name: each.value for each in scraped(server.http) if each.name in gauges and each.value > 0
        }
        if not left:
            return
        if time.monotonic() > end_s:
            raise HostileLoadError(f"after all calls have ended: {left}")
        time.sleep(0.5)


def check_counted(before: Counter[str], after: Counter[str], seen: Counter[str]) -> None:
    """Check that the server counted as many calls of each method as were made.

    Raises:
        HostileLoadError: it counted others.
    """

    def by_method(counts: Counter[str]) -> Counter[str]:
        methods: Counter[str] = Counter()
        for name, number in counts.items():
            methods[name.split()[0]] += number
        return methods

    # A call that its caller gave up may never have arrived.
    left = Counter({name: number for name, number in seen.items() if name.split()[1] not in GIVEN_UP})
    for name in OF_DELETED_TASKS:
        del left[name]
    counted_calls, made = by_method(after) - by_method(before), by_method(left)
    for method, number in made.items():
        if counted_calls[method] < number:
            raise HostileLoadError(f"{number} calls of {method} were made, {counted_calls[method]} counted")


def main() -> None:
    """Print a line for each attack, and one for all."""
    parser = argparse.ArgumentParser(prog="python -m hostile_load", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="alias or directory (%(default)s)")
    parser.add_argument("--each", type=float, default=20.0, help="seconds of each attack alone (%(default)s)")
    parser.add_argument("--mixed", type=float, default=600.0, help="seconds of all together (%(default)s)")
    parser.add_argument("--only", default="", help="attacks to make, comma-separated; all by default")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args()
    kinds = options.only.split(",") if options.only else list(ATTACKS)
    with (
        tempfile.TemporaryDirectory(prefix="hostile-load-") as name,
        attackable(options.model, Path(name)) as server,
    ):
        quiet = _quiet(server, options.each or 10.0)
        usual_s = median(quiet.gaps_s)
        print(
            f"quiet: a token every {usual_s * 1000:.1f} ms, largest gap {max(quiet.gaps_s) / usual_s:.1f} medians"
        )
        for kind in kinds if options.each else ():
            before = turns_over(server.http, MAX_TURN_S)
            seen = server.attack([kind], options.each, options.seed)
            num_long = turns_over(server.http, MAX_TURN_S) - before
            slowest_s = max(p.metrics_s for p in seen.probes)
            during_s = median(seen.gaps_s)
            print(
                f"{kind}: largest gap {max(seen.gaps_s) / usual_s:.1f} of the quiet medians, "
                f"{max(seen.gaps_s) / during_s:.1f} of its own ({during_s * 1000:.1f} ms); "
                f"{num_long} turns of the event loop over {MAX_TURN_S * 1000:.0f} ms; "
                f"/metrics {slowest_s * 1000:.0f} ms at most; {seen.codes or 'no calls'}",
                flush=True,
            )
            check_idle(server)
        if options.mixed:
            before = counted(server.http)
            seen = server.attack(kinds, options.mixed, options.seed)
            check_idle(server)
            check_counted(before, counted(server.http), seen.statuses)
            held = check_memory(seen.probes, MAX_GROWTH_BYTES)
            slowest_s = max(p.metrics_s for p in seen.probes)
            print(
                f"all together for {options.mixed:.0f} s: the server lives, always ready; {seen.codes}; "
                f"{seen.num_ended} well-behaved streams ended once each, largest gap {max(seen.gaps_s):.2f} s; "
                f"memory {held} MB, a tenth of the time each; "
                f"/metrics {slowest_s * 1000:.0f} ms at most"
            )


def _quiet(server: Server, seconds: float) -> Attacked:
    """The streams alone."""
    watched = Watched(server.target)
    with watched.going_on():
        time.sleep(seconds)
    return Attacked(watched.gaps_s, Counter(), [], watched.num_ended)


if __name__ == "__main__":
    main()
