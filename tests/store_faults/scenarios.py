"""What is interrupted: operations of a whole store, each from a prepared state."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base, make_lora
from support.factories.registrations import nobody
from support.factories.uploads import content_of, send

_BASE = make_base(names=("org/tiny",))
_NUM_SOURCES = 4

State = list[list[str]]
"""Name, digest and state of every version."""

Operation = Callable[[AdapterStore, Path], object]
"""Done with a store and the directory of the sources."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """An operation.

    Attributes:
        name: what it is.
        prepare: makes the store's directory, by the sources; None for none.
        act: the operation; done twice, it leaves the same as done once.
        with_opening: whether opening the store is part of it.
    """

    name: str
    prepare: Callable[[Path, Path], None] | None
    act: Operation
    with_opening: bool = False


def make_sources(directory: Path) -> None:
    """Adapters a0, a1, …."""
    for n in range(_NUM_SOURCES):
        make_lora(directory / f"a{n}", _BASE, rank=2, sites=["q_proj", "up_proj"], seed=n)


def open_scenario_store(directory: Path, sources: Path) -> AdapterStore:
    """The whole store in a directory."""
    return open_store(directory, _BASE, [sources])


def state_of(store: AdapterStore) -> State:
    """What callers can see."""
    return [[record.name, record.digest, record.state.value] for record in store.list().records]


def check_whole(store: AdapterStore, directory: Path) -> None:
    """Every version's bytes are there and right, and nothing else is.

    Raises:
        AssertionError: says what is not.
    """
    records = store.list().records
    for record in records:
        assert store.lower(record).digest == record.digest
    needed = {part.digest.removeprefix("sha256:") for record in records for part in record.parts}
    present = set(os.listdir(directory / "artifacts"))
    assert present == needed, f"{len(present - needed)} orphans, {len(needed - present)} lost"
    for name in ("staging", "scratch"):
        assert os.listdir(directory / name) == [], f"{name} is not empty"


def _empty(directory: Path, sources: Path) -> None:
    open_scenario_store(directory, sources).close()


def _three_versions(directory: Path, sources: Path) -> None:
    """Of two tasks that share an artifact."""
    store = open_scenario_store(directory, sources)
    store.register(Registration("fr", Uri("a0")))
    store.register(Registration("fr", Uri("a1")))
    store.register(Registration("de", Uri("a1")))
    store.close()


def _leftovers(directory: Path, sources: Path) -> None:
    """All that crashes may leave, at once."""
    _three_versions(directory, sources)
    for place in ("artifacts/" + "0" * 64, "staging/half", "scratch/upload"):
        shutil.copytree(sources / "a3", directory / place)


def _delete(name: str) -> Operation:
    task, _, version = name.partition("@")

    def act(store: AdapterStore, sources: Path) -> None:
        records = store.list(task_id=task).records
        if any(version in ("", str(record.version)) for record in records):
            store.delete(name, in_use=nobody)

    return act


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("make a store", None, lambda store, sources: None, with_opening=True),
    Scenario("open and sweep", _leftovers, lambda store, sources: None, with_opening=True),
    Scenario(
        "register, first version",
        _empty,
        lambda store, sources: store.register(Registration("fr", Uri("a0"), request_id="request")),
    ),
    Scenario(
        "register, next version",
        _three_versions,
        lambda store, sources: store.register(Registration("fr", Uri("a2"), request_id="request")),
    ),
    Scenario(
        "register, bytes that are there",
        _three_versions,
        lambda store, sources: store.register(Registration("es", Uri("a0"))),
    ),
    Scenario(
        "register, composed",
        _three_versions,
        lambda store, sources: store.register(
            Registration("fr", Parts([Part("a0"), Part("a2", 0.5), Part("a3")]))
        ),
    ),
    Scenario(
        "upload",
        _three_versions,
        lambda store, sources: send(store, "fr", content_of(sources / "a2"), request_id="request"),
    ),
    Scenario("activate back", _three_versions, lambda store, sources: store.activate("fr@1")),
    Scenario("delete a version", _three_versions, _delete("fr@1")),
    Scenario("delete a task", _three_versions, _delete("fr")),
)
