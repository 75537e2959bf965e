"""Very many requests on a real engine and a real store, each ended in its own way, and nothing left of any.

``make churn`` (``CHURN_REQUESTS=100000``), or ``python -m churn`` in ``tests``. Callers leave, give up, stop reading,
come with deadlines that have passed or soon will; versions are registered and deleted under them; memory and slots for
adapters and blocks for keys and values are far too few. Every request must have exactly one end. Afterwards no block is
held, no lease, slot, thread or file, and the process is no larger than it was.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import threading
from pathlib import Path

import psutil

from churn.calls import NUM_SLOTS, NUM_TASKS, Churn, task_name
from churn.watching import ChurnError, check_process
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from manyhats.engine.checkpoints.loader import LoadedModel
from restart_under_load import check_files
from support.factories.adapters import make_ia3, make_lora
from support.factories.prefixes import make_prefix, make_prompt
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import load_tiny, running_engine


def make_sources(root: Path, base: BaseDescription) -> tuple[list[Path], int]:
    """Adapters of several methods, and the bytes of the largest."""
    made = [
        *(make_lora(root / f"lora{seed}", base, seed=seed) for seed in range(8)),
        *(make_ia3(root / f"ia3-{seed}", base, seed=seed) for seed in range(3)),
        make_prefix(root / "prefix", base),
        make_prompt(root / "prompt", base, num_virtual_tokens=20),
    ]
    return made, max(path.stat().st_size for path in root.rglob("*.safetensors"))


async def churn(model: LoadedModel, root: Path, num_requests: int, seed: int) -> str:
    """Ask so many times.

    Args:
        model: tiny.
        root: an empty directory.
        num_requests: of all callers.
        seed: of everything but what threads do.

    Returns:
        What happened, in words.

    Raises:
        ChurnError: something is left, or a request did not end once.
    """
    sources, size = make_sources(root / "sources", model.description)
    store = open_store(root / "store", model.description, [root / "sources"])
    process = psutil.Process()
    rss_bytes: list[int] = []
    for index in range(NUM_TASKS):
        store.register(Registration(task_name(index), Uri(str(sources[index]))))
    num_threads, num_files = threading.active_count(), process.num_fds()
    async with running_engine(
        model,
        store.lower,
        max_num_sequences=12,
        max_num_batched_tokens=64,
        max_waiting=40,
        max_loaded_adapters=NUM_SLOTS,
        max_adapter_bytes=6 * size,
        kv_cache_bytes=1 << 18,
        unread_limit_s=0.3,
        max_unread_outputs=8,
    ) as engine:
        churning = Churn(engine, store, sources, seed)
        await churning.run(num_requests, lambda: rss_bytes.append(process.memory_info().rss))
        await churning.check_idle()
        residency = engine.residency_stats
    if churning.ends.seen.total() != num_requests:
        raise ChurnError(f"of {num_requests} requests {churning.ends.seen.total()} have ended")
    store.close()
    check_files(root / "store", 0)
    check_process(process, num_threads, num_files, rss_bytes)
    seen = ", ".join(f"{count} {name}" for name, count in churning.ends.seen.most_common())
    return (
        f"{num_requests} requests: {seen}; {residency.num_loads} loads, {residency.num_evictions} evictions from "
        f"memory and {residency.num_slot_evictions} from slots, {churning.num_changes} changes of versions; at most "
        f"{max(rss_bytes):,} bytes; nothing left"
    )


def main() -> None:
    """Print what happened."""
    parser = argparse.ArgumentParser(prog="python -m churn", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="drawn and printed if not given")
    options = parser.parse_args()
    seed = random.randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="churn-") as name:
        root = Path(name)
        model = load_tiny(make_checkpoint(root / "model"))
        print(asyncio.run(churn(model, root, options.requests, seed)))


if __name__ == "__main__":
    main()
