"""What the table says besides its rows: what is missing and why, and when the machine was not quiet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.measure import Sample
from benchmarks.peers.rows import PEER_OF
from benchmarks.report import MAX_BUSY_CORES, Result, busy_moments, table
from benchmarks.row import Row


def rows_of(rows: Sequence[Row], peers: Sequence[str]) -> list[Row]:
    """Those that compare with nobody but chosen peers and manyhats itself."""
    return [row for row in rows if peers_of(row) <= set(peers)]


def peers_of(row: Row) -> set[str]:
    """What ``--peers`` calls the systems whose figures a row needs."""
    picks = [row.ours] if row.against is None else [row.ours, row.against]
    return {PEER_OF[pick.system] for pick in picks if pick.system in PEER_OF}


def full_table(
    rows: Sequence[Row], results: Sequence[Result], samples: Sequence[Sample], skipped: Mapping[str, str]
) -> str:
    """The rows that have figures; then every row that has none, and all that makes the figures doubtful.

    Args:
        skipped: why a peer was not measured, or not to the end.
    """
    return "\n".join(
        [table(results), *_missing(rows, results, skipped), *_goals(results), *_disturbances(samples)]
    )


def _missing(rows: Sequence[Row], results: Sequence[Result], skipped: Mapping[str, str]) -> Iterator[str]:
    for peer, reason in skipped.items():
        yield f"\nSKIPPED {peer}: {reason}"
    measured = {result.row for result in results}
    for row in rows:
        if row not in measured:
            whose = ", ".join(sorted(peers_of(row) & skipped.keys())) or "no figures"
            goal = (
                "" if row.floor is None else f"; its goal of {row.floor.value:g}x is not known to be reached"
            )
            yield f"not measured ({whose}): {row.subject}: {row.title}{goal}"


def _goals(results: Sequence[Result]) -> Iterator[str]:
    judged = [result.verdict for result in results if result.verdict]
    if judged:
        reached = judged.count("ok")
        yield f"\n{reached} of {len(judged)} goals that were measured are reached."


def _disturbances(samples: Sequence[Sample]) -> Iterator[str]:
    """Each moment at which nothing was measured and something ran all the same."""
    for sample, cores in busy_moments(samples):
        if cores > MAX_BUSY_CORES:
            yield f"NOT QUIET: {cores:.1f} cores busy with other work in round {sample.round + 1}, {sample.variant}"
