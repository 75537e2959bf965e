"""``python -m benchmarks.scrapes``: what a scrape of many tasks takes, and what streams notice of one each second.

A server has 1,000 tasks, of which 100 have answered. In turn, streams of the base model run without scrapes and with
one a second, for which Prometheus' own headers ask.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.measure import percentile
from benchmarks.process import serving
from benchmarks.run import make_workload
from benchmarks.workload import Adapter, Case, Settings, Workload
from manyhats.client import AsyncClient, Client

_NUM_TASKS, _NUM_HOT = 1000, 100
_HOT, _COLD = Adapter("lora", 0), Adapter("lora", 1)
_HEADERS = {
    "Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "Accept-Encoding": "gzip",
}
_PERIOD_S = 1.0
_NUM_TOKENS = 256


def fill(workload: Workload, store: Path) -> None:
    """Make 100 tasks of one artifact, and 900 of another that nobody asks for."""
    from manyhats.adapters.limits import Quotas
    from manyhats.adapters.registration import Registration, Uri
    from manyhats.adapters.store.catalogue.catalogue import Catalogue

    with serving(workload, store) as server, Client(server.grpc) as client:
        for name, adapter in (("hot000", _HOT), ("cold000", _COLD)):
            client.register_adapter(name, str(workload.adapters[adapter]))
    catalogue = Catalogue(f"sqlite:///{store / 'catalogue.db'}")
    for first, count in (("hot", _NUM_HOT), ("cold", _NUM_TASKS - _NUM_HOT)):
        (record,) = catalogue.versions(f"{first}000")
        for index in range(1, count):
            other = replace(record, task_id=f"{first}{index:03}")
            catalogue.add(other, Registration(other.task_id, Uri(other.source)), Quotas())
    catalogue.close()


async def answer_hot(client: AsyncClient) -> None:
    """Let each hot task answer twice."""
    for index in range(2 * _NUM_HOT):
        await client.generate([40], task_id=f"hot{index % _NUM_HOT:03}", max_new_tokens=4, ignore_eos=True)


async def stream(client: AsyncClient, prompt: list[int], end_s: float) -> list[float]:
    """Seconds between the tokens of one generation after another."""
    gaps: list[float] = []
    while time.perf_counter() < end_s:
        arrived: list[float] = []
        async with client.generate_stream(prompt, max_new_tokens=_NUM_TOKENS, ignore_eos=True) as answer:
            async for chunk in answer:
                arrived += [time.perf_counter()] * len(chunk.tokens)
                if arrived[-1] > end_s:
                    break
        gaps += [after - before for before, after in pairwise(arrived)]
    return gaps


async def scrape(http: str, end_s: float) -> list[tuple[float, int]]:
    """Seconds and bytes of one scrape a second."""

    def once() -> tuple[float, int]:
        began_s = time.perf_counter()
        request = urllib.request.Request(f"http://{http}/metrics", headers=_HEADERS)
        with urllib.request.urlopen(request, timeout=30) as response:
            size = len(response.read())
        return time.perf_counter() - began_s, size

    found = []
    while time.perf_counter() < end_s:
        found.append(await asyncio.to_thread(once))
        await asyncio.sleep(_PERIOD_S)
    return found


async def measure(workload: Workload, grpc: str, http: str, options: argparse.Namespace) -> None:
    """Rounds of streams without scrapes and with them, and what they come to."""
    gaps: dict[bool, list[float]] = {False: [], True: []}
    scrapes: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
    prompts = workload.prompts(Case(options.streams), 0)
    async with AsyncClient(grpc) as client:
        await answer_hot(client)
        scrapes[False] = await scrape(http, time.perf_counter() + options.seconds)  # of an idle server
        for round_number in range(2 * options.rounds + 2):
            is_scraped = round_number % 2 == 1
            end_s = time.perf_counter() + options.seconds
            streams = [stream(client, prompt, end_s) for prompt in prompts]
            scraping = asyncio.create_task(scrape(http, end_s)) if is_scraped else None
            found = await asyncio.gather(*streams)
            told = [] if scraping is None else await scraping
            if round_number >= 2:  # the first pair only warms up
                gaps[is_scraped] += [gap for each in found for gap in each]
                scrapes[True] += told
    report(gaps, scrapes)


def report(gaps: dict[bool, list[float]], scrapes: dict[bool, list[tuple[float, int]]]) -> None:
    """Print a table in Markdown."""
    print("| | without scrapes | with one a second | ratio |\n|---|---|---|---|")
    for percent in (50, 95, 99):
        plain, scraped = (1000 * percentile(gaps[each], percent) for each in (False, True))
        print(f"| inter-token p{percent}, ms | {plain:.2f} | {scraped:.2f} | {scraped / plain:.3f} |")
    for name, found in (("idle", scrapes[False]), ("beside streams", scrapes[True])):
        seconds = [each for each, _ in found]
        size = max(size for _, size in found)
        print(
            f"\nscrape, {name}: median {1000 * median(seconds):.1f} ms, p95 "
            f"{1000 * percentile(seconds, 95):.1f} ms, {size / 1000:.1f} kB"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.scrapes")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="of both kinds in turn (5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each (10)")
    options = parser.parse_args(arguments)
    with TemporaryDirectory(prefix="manyhats-bench-") as directory:
        root = Path(directory)
        settings = Settings(threads=options.threads)
        workload = make_workload(options.model, settings, root, {_HOT, _COLD})
        fill(workload, root / "store")
        with serving(workload, root / "store") as server:
            asyncio.run(measure(workload, server.grpc, server.http, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
