"""What determines a run's course, by name: a checkpoint can only be resumed if all of it is the same."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from manyhats.trainer.data.batch import TokenizedRow, TrainingRow
from manyhats.trainer.errors import CheckpointError
from manyhats.trainer.settings.settings import TrainSettings

Fingerprint = Mapping[str, Any]
"""Dotted name of a setting, or of a property of the data or the base → its value as in JSON."""

# Where and how often things are saved, and how they are computed: these leave the losses the same.
_WITHOUT_INFLUENCE = frozenset(
    {
        "out",
        "save_dtype",
        "optimization.checkpoint_steps",
        "optimization.keep_checkpoints",
        "model.num_threads",
        "model.gradient_checkpointing",
        # Their rows are compared instead, so that a file may move.
        "data.train",
        "data.eval",
        "data.max_train_rows",
        "data.max_eval_rows",
        "data.labels",
        "data.ignore_fields",
    }
)


def fingerprint(
    settings: TrainSettings,
    train: Sequence[TrainingRow],
    held_out: Sequence[TrainingRow],
    base: Mapping[str, str],
) -> Fingerprint:
    """Everything that determines a run's losses.

    Args:
        settings: those that do not affect them are left out.
        train: the rows, in order.
        held_out: the evaluation rows.
        base: what else determines them, such as the base's digest and the resolved dtype.
    """
    return {
        **{
            name: value
            for name, value in settings_by_name(settings).items()
            if name not in _WITHOUT_INFLUENCE
        },
        "training rows": rows_digest(train),
        "evaluation rows": rows_digest(held_out),
        **base,
    }


def settings_by_name(settings: TrainSettings) -> dict[str, Any]:
    """Every setting by its dotted name, as in JSON, and the method as ``adapter.method``."""
    named = _flat(asdict(settings), "")
    return {"task": settings.task, "adapter.method": settings.adapter.method.value, **named}


def check_same(was: Fingerprint, now: Fingerprint, checkpoint: str) -> None:
    """Check that a checkpoint is of this run.

    Raises:
        CheckpointError: names what differs.
    """
    names = [name for name in (*now, *(was.keys() - now.keys())) if was.get(name) != now.get(name)]
    if names:
        raise CheckpointError(
            f"{checkpoint} is of another training run: "
            + "; ".join(_difference(name, was, now) for name in names)
        )


def rows_digest(rows: Sequence[TrainingRow]) -> str:
    """SHA-256 over the number of rows, and each one's tokens and targets."""
    digest = hashlib.sha256(len(rows).to_bytes(8, "little"))
    for row in rows:
        if isinstance(row, TokenizedRow):
            _add_tokens(digest, row.token_ids)
            digest.update(bytes(row.is_target))
            continue
        for text in row.texts:
            _add_tokens(digest, text.token_ids)
            digest.update(bytes(text.token_types))
        digest.update(array("d", row.targets).tobytes())
    return f"sha256:{digest.hexdigest()}"


def _add_tokens(digest: hashlib._Hash, token_ids: Sequence[int]) -> None:
    digest.update(len(token_ids).to_bytes(8, "little"))
    digest.update(array("q", token_ids).tobytes())


def _difference(name: str, was: Fingerprint, now: Fingerprint) -> str:
    if "sha256:" in f"{was.get(name)}{now.get(name)}":
        return f"{name}: not the same"
    return f"{name}: was {was.get(name)!r}, is {now.get(name)!r}"


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Nested settings as one mapping; a pattern's mapping is one value."""
    if not isinstance(value, dict) or name.endswith("_pattern"):
        return {name: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{name}.{key}" if name else key)
    return flat
