"""Everything that is looked at, in order, and what an error there means."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as HangError
from typing import TypeVar

from manyhats.adapters.errors import AdapterError
from manyhats.engine.errors import EngineError
from manyhats.engine.threads.apart import in_thread
from manyhats.server.access.errors import ConfigError
from manyhats.server.doctor.access import look_at_tls, look_at_tokens
from manyhats.server.doctor.finding import Condition, Finding, failure, ok
from manyhats.server.doctor.ports import look_at_event_loop, look_at_files, look_at_ports
from manyhats.server.doctor.traces import look_at_traces
from manyhats.server.lifetime.cgroup import Cgroup
from manyhats.server.lifetime.config import ServeConfig

T = TypeVar("T")
Looks = Callable[[], Iterator[Finding]]

# Databases and object stores have limits of their own, which are shorter; a network file system has none.
_HANG_S = 60.0


def examine(config: ServeConfig, *, is_running: bool = False) -> Iterator[Finding]:
    """Look at everything that a server with these settings needs; each finding comes as it is made.

    Nothing is fetched, and nothing is left behind.

    Args:
        config: the settings.
        is_running: whether such a server runs, so that its ports are not free.
    """
    # Imported here: torch takes seconds, and what comes before it may explain why it cannot be imported.
    yield from _each("settings", lambda: iter([ok("settings", "fit together")]))
    yield from _processor(config)
    yield from _model(config)
    yield from _store_and_tokens(config)
    yield from _each("TLS", lambda: look_at_tls(config))
    if not is_running:
        yield from _each("ports", lambda: look_at_ports(config))
    yield from _each("traces", lambda: look_at_traces(os.environ))
    yield from _each("event loop", look_at_event_loop)
    yield from _each("open files", look_at_files)


def _processor(config: ServeConfig) -> Iterator[Finding]:
    def look() -> Iterator[Finding]:
        from manyhats.engine.backends.open import kernel_directory
        from manyhats.server.doctor import model, processor

        kept = list(model.look_at_kernel_cache(kernel_directory()))
        yield from kept
        if any(each.condition is Condition.FAILURE for each in kept):
            return  # the kernels cannot be imported
        report = processor.report_processor(config)
        yield from processor.look_at_kernels(report)
        yield from processor.look_at_threads(report, config, Cgroup())

    def look_at_device() -> Iterator[Finding]:
        from manyhats.server.doctor import processor

        yield from processor.look_at_device(config)

    yield from _each("processor", look)
    yield from _each("device", look_at_device)


def _model(config: ServeConfig) -> Iterator[Finding]:
    def look() -> Iterator[Finding]:
        from manyhats.server.doctor import model

        found = model.inspect_served_model(config)
        yield from model.look_at_model(found, config)
        yield from model.look_at_memory(found, config, Cgroup())

    yield from _each("model", look)


def _store_and_tokens(config: ServeConfig) -> Iterator[Finding]:
    tasks: frozenset[str] | None = None

    def look() -> Iterator[Finding]:
        nonlocal tasks
        from manyhats.server.doctor import store

        yield from store.look_at_extras(config)
        yield from store.look_at_roots(config)
        for found in _unless_hanging(lambda: list(store.look_at_store(config))):
            if isinstance(found, Finding):
                yield found
            else:
                tasks = found

    yield from _each("store", look)
    yield from _each("tokens", lambda: look_at_tokens(config, tasks))


def _unless_hanging(work: Callable[[], T]) -> T:
    return in_thread(work, "doctor").result(_HANG_S)


def _each(subject: str, look: Looks) -> Iterator[Finding]:
    """The findings of one look; whatever keeps it from ending is one itself."""
    try:
        yield from look()
    except (ConfigError, EngineError, AdapterError) as error:
        yield failure(subject, str(error), "correct that setting, or what it names")
    except HangError:
        yield failure(
            subject, f"has not answered for {_HANG_S:.0f} s", "see whether its network and disks are up"
        )
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        yield failure(subject, text, "let this user read and write there, or give another place")
    except Exception as error:  # noqa: BLE001 - a server would meet the same error
        yield failure(subject, f"{type(error).__name__}: {error}", "a server would meet the same error")
