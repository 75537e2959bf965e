"""All jobs of a recording, and what they come to together."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

from recording.answers import record_answers
from recording.exact import Recorded, exact, file_digests
from recording.inputs import DEFAULT_MODEL, TINY_NAME, Subject, make_subjects
from recording.refusals import record_refusals
from recording.registrations import change_tasks, record_store, register_tasks
from recording.surface import record_commands, record_logits, record_metrics
from recording.trainings import BASES, record_memory, record_trainings, write_data
from recording.workplace import Workplace

Sections: TypeAlias = dict[str, Recorded]
Job: TypeAlias = tuple[str, Callable[[], Sections]]

_EVERY_KIND = (("nf4", "bfloat16"), ("none", "float32"), ("nf4", "float32"), ("none", "bfloat16"))
# Families differ in their forward; kernels of every kind are recorded on the first, and as raw logits.
_KINDS = {"llama": _EVERY_KIND, DEFAULT_MODEL: _EVERY_KIND[:2]}
_MEMORY_OF = ("lora", "prefix")


def record_all(root: Path, num_jobs: int, only: str) -> Sections:
    """Section → name → value, of everything, or of what has a text in its name."""
    place = Workplace(root)
    subjects = list(make_subjects(root))
    write_data(root)
    recorded: Sections = {
        "machine": _machine(),
        "inputs": {name: file_digests(root / name) for name in ("models", "adapters")},
        "commands": dict(record_commands()),
    }
    jobs = [(name, job) for name, job in _jobs(place, subjects) if only in name]
    with ThreadPoolExecutor(num_jobs) as pool:
        started = [(name, pool.submit(job)) for name, job in jobs]
        try:
            for name, job in started:
                for section, value in job.result().items():
                    named = recorded.setdefault(section, {})
                    assert isinstance(named, dict)
                    named[name] = value
                print(f"recorded: {name}", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    recorded["nf4 cache"] = exact(file_digests(place.home / "nf4"))
    return recorded


def _machine() -> Recorded:
    names = (
        "torch",
        "numba",
        "llvmlite",
        "numpy",
        "bitsandbytes",
        "transformers",
        "tokenizers",
        "safetensors",
    )
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next((line for line in lines if line.startswith("model name")), platform.machine()),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def _jobs(place: Workplace, subjects: Sequence[Subject]) -> Iterator[Job]:
    """The longest first."""
    for subject in reversed(subjects):
        for index, (quantization, dtype) in enumerate(_KINDS.get(subject.name, _EVERY_KIND[:1])):
            served = subject.every_fifth() if index > 1 else subject
            name = f"{subject.name}, {quantization}, {dtype}"
            yield name, partial(_record_served, place, served, quantization, dtype, name)
    for base in BASES:
        yield base, partial(_section, "trainings", record_trainings, place, base)
    for method in _MEMORY_OF:
        yield method, partial(_section, "predicted memory", record_memory, place, method)
    models = {subject.name: place.root / subject.model for subject in subjects[:-1]}
    yield "raw", partial(_section, "logits", record_logits, models)


def _section(name: str, record: Callable[..., Recorded], *args: object) -> Sections:
    return {name: record(*args)}


def _record_served(place: Workplace, subject: Subject, quantization: str, dtype: str, name: str) -> Sections:
    """All that a server of one model shows and leaves; its other calls and refusals where it is the first of all."""
    adapters = place.root / "adapters"
    flags = (
        f"--model {subject.model} --quantization {quantization} --dtype {dtype} --device cpu --num-threads 1"
    )
    more = f"--adapter-root adapters --base-name {TINY_NAME} --store"
    store = name.replace(", ", "-")
    found: Sections = {}
    with place.serve(store, *flags.split(), *more.split(), store) as served:
        client = served.client
        found["servers"] = exact(client.server_info())
        found["registrations"] = dict(register_tasks(client, subject, adapters))
        tasks = [info.task_id for info in client.list_adapters()]
        found |= record_answers(client, subject, tasks)
        if name == "llama, nf4, bfloat16":
            found["metrics"] = record_metrics(served.http)
            found["other calls"] = dict(change_tasks(client, subject, adapters))
            found["refusals"] = dict(record_refusals(client, served.grpc, adapters))
    return found | record_store(place.root / store)
