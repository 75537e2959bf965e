"""The allocator of a device's buffer: regions never overlap, and all of it comes back in one piece."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from manyhats.engine.backends.cuda.arena import ALIGNMENT, Arena, ArenaFullError, Region

NUM_BYTES = 40 * ALIGNMENT


class ArenaMachine(RuleBasedStateMachine):
    """Any order of taking and giving back; bytes are counted one unit of alignment at a time."""

    regions: Bundle[Region | None] = Bundle("regions")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(NUM_BYTES + 100)
        self.units: dict[int, Region] = {}

    def runs(self) -> list[range]:
        """The free units, as the longest runs of neighbours."""
        found: list[range] = []
        for unit in range(NUM_BYTES // ALIGNMENT):
            if unit not in self.units:
                is_next = bool(found) and found[-1].stop == unit
                start = found.pop().start if is_next else unit
                found.append(range(start, unit + 1))
        return found

    @rule(target=regions, num_bytes=st.integers(0, NUM_BYTES + ALIGNMENT))
    def allocate(self, num_bytes: int) -> Region | None:
        needed = max(1, -(-num_bytes // ALIGNMENT))
        fitting = sorted((len(run), run.start) for run in self.runs() if len(run) >= needed)
        if not fitting:
            with pytest.raises(ArenaFullError):
                self.arena.allocate(num_bytes)
            return None
        region = self.arena.allocate(num_bytes)
        assert region == Region(fitting[0][1] * ALIGNMENT, needed * ALIGNMENT)
        taken = range(region.begin // ALIGNMENT, region.end // ALIGNMENT)
        assert not self.units.keys() & set(taken)
        self.units |= dict.fromkeys(taken, region)
        return region

    @rule(num_bytes=st.integers(0, NUM_BYTES), data=st.data())
    def evict(self, num_bytes: int, data: st.DataObject) -> None:
        """As few of the first regions as make room, and of these only what the room is made of."""
        used = sorted(set(self.units.values()))
        candidates = data.draw(st.permutations(used)) if used else []
        count = next((n for n in range(len(candidates) + 1) if self.fits(num_bytes, candidates[:n])), None)
        evicted = self.arena.evictions(num_bytes, candidates)
        if count is None:
            assert evicted is None
            return
        assert evicted is not None
        assert set(evicted) <= set(candidates[:count])
        assert self.fits(num_bytes, evicted)
        assert evicted == [each for each in candidates if each in evicted]

    def fits(self, num_bytes: int, without: list[Region]) -> bool:
        arena = Arena(NUM_BYTES)
        arena._free = list(self.arena.free_regions)
        arena._used = {region.begin: region for region in self.units.values()}
        for region in without:
            arena.free(region)
        return any(region.num_bytes >= num_bytes for region in arena.free_regions)

    @rule(region=consumes(regions))
    def free(self, region: Region | None) -> None:
        if region is not None:
            self.arena.free(region)
            self.units = {unit: owner for unit, owner in self.units.items() if owner != region}

    @invariant()
    def free_regions_are_the_longest_runs(self) -> None:
        expected = [Region(run.start * ALIGNMENT, len(run) * ALIGNMENT) for run in self.runs()]
        assert list(self.arena.free_regions) == expected
        assert self.arena.num_free_bytes == NUM_BYTES - len(self.units) * ALIGNMENT

    def teardown(self) -> None:
        for region in set(self.units.values()):
            self.arena.free(region)
        assert self.arena.free_regions == (Region(0, NUM_BYTES),)


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_region_is_given_back_once() -> None:
    arena = Arena(NUM_BYTES)
    region = arena.allocate(1)
    arena.free(region)
    with pytest.raises(KeyError):
        arena.free(region)


def test_a_full_arena_says_what_was_needed_and_what_there_is() -> None:
    arena = Arena(2 * ALIGNMENT)
    arena.allocate(1)
    with pytest.raises(ArenaFullError, match=f"{2 * ALIGNMENT} bytes are needed.*{ALIGNMENT}"):
        arena.allocate(ALIGNMENT + 1)
