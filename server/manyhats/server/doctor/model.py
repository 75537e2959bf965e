"""The base model's files, the memory that it will take, and the compiled kernels."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from manyhats.engine.config import kv_cache_bytes, resolve
from manyhats.engine.home import default_home
from manyhats.server.doctor.finding import Finding, failure, ok, warning
from manyhats.server.lifetime.cgroup import Cgroup
from manyhats.server.lifetime.config import ServeConfig

if TYPE_CHECKING:
    from manyhats.engine.checkpoints.inspection import ModelOnDisk

_RUNTIME_BYTES = 700 * 2**20
"""Of Python, the libraries and the compiled kernels, as measured on a server without requests."""


def inspect_served_model(config: ServeConfig) -> ModelOnDisk | None:
    """The files of the model that the settings name; None if the first start would fetch them.

    Raises:
        EngineError: they cannot be served.
    """
    from manyhats.engine.checkpoints.inspection import inspect_model

    return inspect_model(
        config.model,
        quantization=config.quantization,
        max_context_length=config.max_context_length,
        home=default_home(),
    )


def look_at_model(model: ModelOnDisk | None, config: ServeConfig) -> Iterator[Finding]:
    """Whether the model is here and whole."""
    if model is None:
        yield warning(
            "model",
            f"{config.model} is not on this machine: the first start fetches it",
            f"to fetch it now: manyhats model fetch {config.model}",
        )
        return
    text = f"{config.model} in {model.directory}, whole"
    if model.must_quantize:
        yield ok("model", f"{text}; the first start quantizes it, and keeps the result")
    else:
        yield ok("model", f"{text}; quantization {model.quantization}")


def look_at_memory(model: ModelOnDisk | None, config: ServeConfig, cgroup: Cgroup) -> Iterator[Finding]:
    """Whether model, KV cache and adapters fit into the memory."""
    memory = cgroup.memory()
    if memory is None:
        yield ok("memory", "this system does not say how much there is")
        return
    if model is None:
        yield ok(
            "memory", f"{_size(memory.available)} available; what the model takes is known once it is here"
        )
        return
    from manyhats.engine.checkpoints.size import weight_bytes

    settings = resolve(config.engine)
    weights = weight_bytes(
        model.family,
        is_nf4=model.quantization == "nf4",
        element_bytes=4 if settings.dtype == "float32" else 2,
    )
    cache = kv_cache_bytes(settings, model.family.architecture)
    at_start = _RUNTIME_BYTES + weights + cache
    at_most = at_start + settings.max_adapter_bytes
    asked = settings.kv_cache_bytes or cache
    # Never more than all sequences can fill.
    of = f" (of the {_size(asked)} given)" if cache < 0.9 * asked else ""
    text = (
        f"model {_size(weights)}, KV cache {_size(cache)}{of}, process {_size(_RUNTIME_BYTES)}, adapters up to"
        f" {_size(settings.max_adapter_bytes)}; {_size(memory.available)} of {_size(memory.total)} available"
    )
    smaller = "--kv-cache-bytes, --kv-cache-dtype int8 and --adapter-memory-bytes make it less"
    if at_start > memory.total:
        yield failure("memory", text, f"give it {_size(at_most)}, or take a smaller model; {smaller}")
    elif at_most > memory.total:
        yield warning("memory", f"{text}: too little once many adapters are loaded", smaller)
    elif at_most > memory.available:
        yield warning("memory", text, f"end what else takes memory, or {smaller.replace('make', 'and make')}")
    else:
        yield ok("memory", text)


def look_at_kernel_cache(directory: Path) -> Iterator[Finding]:
    """Whether compiled kernels are there, or can be kept."""
    subject = "compiled kernels"
    problem = cannot_write(directory)
    has_some = next(directory.rglob("*.nbi"), None) is not None if directory.is_dir() else False
    if problem and not has_some:
        yield failure(
            subject,
            f"{directory} {problem}: they cannot be kept",
            "make it writable, or give MANYHATS_HOME or NUMBA_CACHE_DIR another directory",
        )
    elif problem:
        yield warning(
            subject,
            f"{directory} {problem}: any that are missing are compiled at each start",
            "make it writable",
        )
    elif not has_some:
        yield ok(subject, f"none in {directory} yet: the first start takes up to two minutes longer")
    else:
        yield ok(subject, f"in {directory}")


def cannot_write(directory: Path) -> str:
    """Why a directory cannot be made or written; empty if it can. What is tried leaves nothing behind."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        return f"cannot be made: {existing} is not a directory"
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            return ""
    except OSError as error:
        if existing != directory:
            return f"cannot be made: {existing} cannot be written ({error.strerror})"
        return f"cannot be written ({error.strerror})"


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
