"""The table of hostile calls, each on the store itself: refused for its reason, leaving no trace, reading no more."""

from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile.audit import Opened, leaks, recorded_opens
from hostile.case import BASE, LIMITS, STATUS, Case, World, make_world, register
from hostile.perform import perform
from hostile.table import CASES
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from support.factories.adapters import make_lora

PYTHON = [Path(path) for path in {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = make_world(tmp_path_factory.mktemp("world"))
    yield world
    world.store.close()


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=[case.id for case in CASES])
def test_hostile_call_is_refused_without_a_trace(world: World, number: int, case: Case) -> None:
    own = world.of_case(f"case-{number}")
    call = case.call(own)
    before = own.state()
    with recorded_opens() as opened, case.during(own), pytest.raises(case.error) as caught:
        perform(own.store, call, gate=case.gate, in_use=case.in_use)
    assert type(caught.value) is case.error
    assert case.subject in str(getattr(caught.value, "subject", getattr(caught.value, "field", "")))
    assert own.state() == before
    assert leaks(opened, [own.root, own.store_directory, *PYTHON]) == []
    assert str(caught.value).isprintable()
    assert str(own.store_directory) not in str(caught.value)


def test_table_is_long_and_its_names_are_distinct() -> None:
    assert len(CASES) >= 80
    assert max(Counter(case.id for case in CASES).values()) == 1


def test_table_has_every_error_of_an_adapter_that_a_caller_can_cause() -> None:
    assert {case.error for case in CASES} == STATUS.keys()


def test_what_the_cases_spoil_is_good(world: World) -> None:
    own = world.of_case("unspoilt")
    make_lora(own.source, BASE, rank=4, seed=3)
    with recorded_opens() as opened:
        perform(own.store, register(own), gate="open", in_use=False)
    assert own.store.get("task").task_id == "task"
    assert any(each.path == "adapter_config.json" for each in opened)
    assert leaks(opened, [own.root, own.store_directory, *PYTHON]) == []
    own.store.delete("task", in_use=lambda record: False)


def test_the_secret_would_be_registered_if_it_were_read(world: World, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", BASE, [world.secret], limits=LIMITS)
    assert store.register(Registration("task", Uri(str(world.secret)))).created
    store.close()


@pytest.mark.parametrize(
    "path", ["{secret}/adapter_config.json", "{root}/../secret", "..", "../x", "a/b", "linked", "/etc/passwd"]
)
def test_the_check_of_openings_finds_what_leaves_the_root(world: World, path: str) -> None:
    opened = Opened(path.format(root=world.root, secret=world.secret), 0)
    assert leaks([opened], [world.root]) == [opened]


def test_openings_are_recorded(world: World) -> None:
    with recorded_opens() as opened:
        (world.secret / "adapter_config.json").read_bytes()
    assert [each.path for each in opened] == [str(world.secret / "adapter_config.json")]
    assert leaks(opened, [world.root]) == opened
