"""From the times of configurations to the table of the fastest, as the engine has it in ``tiles.MEASURED``.

A configuration whose bits do not hold is no choice. Of the ways to cut K, which decide the bits, a shape has one for
all numbers of rows: the one with the least time over all that were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.gpu.record import Found
from manyhats.engine.backends.cuda.linears.tiles import RowTiles, tiles_for

Key = tuple[Any, ...]
"""Of a candidate: shape, how K is cut, bucket, whether it is dense, and the tile."""
_BUCKET, _IS_DENSE, _TILE = 4, 5, 6
_NEVER = 1 << 30


@dataclass(frozen=True, slots=True)
class Chosen:
    """Of one shape.

    Attributes:
        shape: output and input features.
        block_k, splits: how K is cut.
        nf4: tiles by bucket, as keys have them; missing where nothing was measured.
        dense: likewise.
        decoded_rows: from how many rows on decoding first was the faster.
        us: of the fastest, by rows.
    """

    shape: tuple[int, int]
    block_k: int
    splits: int
    nf4: Mapping[int, Sequence[Any]]
    dense: Mapping[int, Sequence[Any]]
    decoded_rows: int
    us: Mapping[int, float]


def chosen(run: Mapping[str, Found]) -> list[Chosen]:
    """The fastest configurations of each shape."""
    bits = run.get("B", Found("B"))
    holding = {tuple(each["candidate"]) for each in bits.of("bits", holds=True)}
    times: dict[tuple[int, int], dict[tuple[int, int], dict[int, dict[Key, float]]]] = {}
    for what in ("nf4", "decoded first"):
        for each in run.get("C", Found("C")).of(what):
            key = tuple(each["candidate"])
            if each.get("absmax", "nested") == "nested" and key in holding:
                by_family = times.setdefault((key[0], key[1]), {})
                by_rows = by_family.setdefault((key[2], key[3]), {})
                by_rows.setdefault(each["rows"], {})[key] = each["us"]
    return [_of_shape(shape, families) for shape, families in times.items()]


def _of_shape(
    shape: tuple[int, int], families: Mapping[tuple[int, int], Mapping[int, Mapping[Key, float]]]
) -> Chosen:
    """Of ways to cut K that were measured with as many numbers of rows; those with fewer are not compared."""
    most = max(map(len, families.values()))
    whole = {family: by_rows for family, by_rows in families.items() if len(by_rows) == most}
    (block_k, splits), by_rows = min(whole.items(), key=lambda item: _cost(item[1]))
    best = {rows: min(keys.items(), key=lambda item: item[1]) for rows, keys in by_rows.items()}
    return Chosen(
        shape=shape,
        block_k=block_k,
        splits=splits,
        nf4=_tiles(by_rows, is_dense=False),
        dense=_tiles(by_rows, is_dense=True),
        decoded_rows=_decoded_rows(best),
        us={rows: us for rows, (_, us) in sorted(best.items())},
    )


def _cost(by_rows: Mapping[int, Mapping[Key, float]]) -> float:
    return geometric_mean([min(keys.values()) for keys in by_rows.values()])


def _tiles(by_rows: Mapping[int, Mapping[Key, float]], *, is_dense: bool) -> dict[int, Sequence[Any]]:
    """For each bucket the tile with the least time over its numbers of rows."""
    costs: dict[int, dict[Key, list[float]]] = {}
    for keys in by_rows.values():
        for key, us in keys.items():
            if key[_IS_DENSE] == is_dense:
                costs.setdefault(key[_BUCKET], {}).setdefault(key, []).append(us)
    return {
        bucket: min(keys, key=lambda key: geometric_mean(keys[key]))[_TILE:]
        for bucket, keys in sorted(costs.items())
    }


def _decoded_rows(best: Mapping[int, tuple[Key, float]]) -> int:
    """The least number of rows from which on decoding first was always the fastest."""
    found = _NEVER
    for rows, (key, _) in sorted(best.items(), reverse=True):
        if not key[_IS_DENSE]:
            break
        found = rows
    return found


def write_configuration(directory: Path, run: Mapping[str, Found]) -> None:
    """Write ``configuration.json``, and ``linear_tiles.py``: what to put into ``MEASURED``."""
    sm = run.get("0", Found("0")).first("card", "sm")
    found = chosen(run)
    content = {
        "sm": sm,
        "card": run.get("0", Found("0")).of("card"),
        "versions": run.get("0", Found("0")).of("versions"),
        "shapes": [asdict(each) for each in found],
    }
    (directory / "configuration.json").write_text(json.dumps(content, indent=1) + "\n")
    (directory / "linear_tiles.py").write_text(source(int(sm), found) if sm and found else _NOTHING)


_NOTHING = "# Nothing was measured on a GPU, so there is nothing for MEASURED.\n"


def source(sm: int, found: Sequence[Chosen]) -> str:
    """Python for ``tiles.MEASURED``; buckets that were not measured have the rule's tiles."""
    entries = "".join(_entry(sm, each) for each in found)
    return f"MEASURED: Mapping[tuple[int, int, int], LinearTiles] = {{\n{entries}}}\n"


def _entry(sm: int, each: Chosen) -> str:
    usual = tiles_for(sm, *each.shape, {})
    nf4 = {**usual.nf4, **_row_tiles(each.nf4)}
    dense = {**_rounded_down(usual.dense, each.splits), **_row_tiles(each.dense)}
    return (
        f"    ({sm}, {each.shape[0]}, {each.shape[1]}): LinearTiles(\n"
        f"        block_k={each.block_k},\n"
        f"        splits={each.splits},\n"
        f"        nf4={{\n{_by_bucket(nf4)}        }},\n"
        f"        dense={{\n{_by_bucket(dense)}        }},\n"
        f"        decoded_rows={each.decoded_rows},\n"
        "    ),\n"
    )


def _row_tiles(tiles: Mapping[int, Sequence[Any]]) -> dict[int, RowTiles]:
    """From what keys have."""
    return {
        bucket: RowTiles(rows, weights, warps, stages, is_split=is_split, gathers=gathers)
        for bucket, (rows, weights, warps, stages, is_split, gathers) in tiles.items()
    }


def _rounded_down(tiles: Mapping[int, RowTiles], splits: int) -> Mapping[int, RowTiles]:
    """With a second sum, of the ranges' own, there are no registers for the widest instruction."""
    if splits == 1:
        return tiles
    return {bucket: replace(tile, rows=min(tile.rows, 128)) for bucket, tile in tiles.items()}


def _by_bucket(tiles: Mapping[int, RowTiles]) -> str:
    return "".join(f"            {bucket}: {_shown(tile)},\n" for bucket, tile in sorted(tiles.items()))


def _shown(tile: RowTiles) -> str:
    fields = [str(size) for size in (tile.rows, tile.weights, tile.num_warps, tile.num_stages)]
    fields += ["is_split=True"] if tile.is_split else []
    fields += [] if tile.gathers else ["gathers=False"]
    return f"RowTiles({', '.join(fields)})"
