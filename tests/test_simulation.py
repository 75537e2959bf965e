"""``python -m benchmarks.simulation``: the scheduler that serves, on a simulated machine."""

from __future__ import annotations

import pytest
from benchmarks.simulation.__main__ import main
from benchmarks.simulation.cluster import spread
from benchmarks.simulation.measures import UnfairError
from benchmarks.simulation.routing import at_random, by_adapters, by_hash
from benchmarks.simulation.scenarios import overload, popular, quiet_first_ms

from manyhats.engine.scheduling.policy import Queue
from manyhats.engine.scheduling.sequence import Sequence


def test_every_request_ends_once_and_nothing_is_left() -> None:
    found = popular(3000, 300, num_slots=16, budget=30)
    assert found.answers.outcomes["OK"] > 2900
    assert found.num_loads - found.num_evictions <= 30 + 2
    assert found.num_slot_evictions > 0
    counts = [count for count, _ in found.answers.first_ms()]
    assert sum(counts) == found.answers.outcomes["OK"]
    assert counts[0] > counts[1] / 2 > 0


def test_more_memory_for_adapters_means_fewer_loads() -> None:
    loads = [popular(2000, 300, num_slots=16, budget=budget).num_loads for budget in (20, 80, 300)]
    assert loads[0] > loads[1] > loads[2]
    assert loads[2] <= 300


def test_shares_are_kept_while_hundreds_of_tasks_wait() -> None:
    found = overload(6000, 300, window=100)
    assert found.shares is not None
    assert found.most_waiting > 2000
    assert found.shares.num_served > 200
    assert 0 < found.shares.widest <= 1


def test_a_queue_that_forgets_shares_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def charge(self: Queue, sequence: Sequence, start: int, end: int) -> None:
        sequence.num_charged = max(sequence.num_charged, end)

    monkeypatch.setattr(Queue, "charge", charge)
    with pytest.raises(UnfairError, match="while both waited"):
        overload(6000, 300)


def test_a_greedy_task_hardly_delays_a_quiet_one() -> None:
    assert quiet_first_ms(600.0, 20.0, rate=3.0) <= 1.75 * quiet_first_ms(12.0, 120.0, rate=3.0)


def test_requests_routed_by_task_need_few_loads() -> None:
    random, hashed, held = (
        spread(make_route, num_requests=3000, num_tasks=300, num_replicas=5, budget=80)
        for make_route in (at_random, by_hash, by_adapters)
    )
    assert max(hashed.loads_per_s, held.loads_per_s) < 0.5 * random.loads_per_s
    assert random.hit_ratio < hashed.hit_ratio < 1
    assert hashed.busiest < 2


def test_the_program_prints_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--requests", "1000", "--tasks", "200"]) == 0
    printed = capsys.readouterr().out
    for words in ("tasks     1 to    10", "from slots", "of the bound", "50 times that"):
        assert words in printed


def test_the_program_prints_how_routes_differ(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--requests", "2000", "--tasks", "200", "--replicas", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines[1:]] == ["at random", "by hash", "by adapters held"]
