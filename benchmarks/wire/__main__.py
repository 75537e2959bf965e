"""``python -m benchmarks.wire``: the server's processor time for a streamed token, with a model that costs nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.worker import Worker

_WAYS = ("grpc", "completions", "chat", "bare")
_THREADS = ("engine", "loop", "others")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of medians, a line for each way and number of streams."""
    options = _parse(arguments)
    from benchmarks.wire.clients import Client
    from benchmarks.wire.servers import BareServer, OwnServer
    from benchmarks.worker import Worker

    found: dict[tuple[str, int], list[Mapping[str, float]]] = {}
    step_s = options.step_ms / 1000
    with (
        Worker(OwnServer, options.model, step_s) as own,
        Worker(BareServer, step_s) as bare,
        Worker(Client) as client,
    ):
        for index in range(options.rounds):
            for num_streams in options.streams:
                for way in options.ways:
                    server = bare if way == "bare" else own
                    found.setdefault((way, num_streams), []).append(
                        _measure(server, client, way, num_streams, options.steps)
                    )
                    print(f"round {index + 1}: {way} {num_streams}", file=sys.stderr, flush=True)
    print(_table(found))
    return 0


def _measure(
    server: Worker, client: Worker, way: str, num_streams: int, num_steps: int
) -> Mapping[str, float]:
    address = server.call("address", "grpc" if way == "grpc" else "http")
    num_together = server.call("expect", num_streams, num_steps)
    client.call("stream", way, address, num_streams, num_together)
    found: Mapping[str, float] = server.call("microseconds")
    return found


def _table(found: Mapping[tuple[str, int], Sequence[Mapping[str, float]]]) -> str:
    lines = [f"{'µs a token':<12} {'streams':>7} {'all':>7} " + " ".join(f"{name:>7}" for name in _THREADS)]
    for (way, num_streams), runs in found.items():
        spent = [median(run.get(name, 0.0) for run in runs) for name in _THREADS]
        total = median(sum(run.values()) for run in runs)
        lines.append(
            f"{way:<12} {num_streams:>7} {total:>7.1f} " + " ".join(f"{value:>7.1f}" for value in spent)
        )
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="whose tokenizer is used (%(default)s)"
    )
    parser.add_argument("--streams", type=_numbers, default=(1, 8, 32), help="at once (1,8,32)")
    parser.add_argument("--steps", type=int, default=200, help="counted in a run (%(default)s)")
    parser.add_argument("--step-ms", type=float, default=20.0, help="how long the model waits (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=_WAYS, help=",".join(_WAYS))
    return parser.parse_args(arguments)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
