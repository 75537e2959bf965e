"""The checkpoints of one run: written whole, resumed exactly; the newest and the best are kept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from manyhats.trainer.data.head_data import HeadData
from manyhats.trainer.data.task_data import TaskData
from manyhats.trainer.errors import CheckpointError
from manyhats.trainer.files.durable import remove_directory, remove_staged, write_directory
from manyhats.trainer.files.output_directory import checkpoints_directory
from manyhats.trainer.report.fingerprint import Fingerprint, check_same, fingerprint
from manyhats.trainer.run.state import STATE_FILE, RunState, decode, decode_header, encode
from manyhats.trainer.settings.settings import TrainSettings

_NAME = re.compile(r"step-(\d{6,})")


def open_checkpoints(
    settings: TrainSettings, data: TaskData | HeadData, base: Mapping[str, str], date: datetime | None = None
) -> Checkpoints | None:
    """Where a run with these settings and data keeps its checkpoints; None without an output directory.

    Args:
        base: what else determines its course, such as the base's digest.
        date: the one that chat templates wrote into the rows; recorded, so that a run resumed later keeps it.
    """
    if not settings.out:
        return None
    return Checkpoints(
        checkpoints_directory(Path(settings.out)),
        settings.optimization.keep_checkpoints,
        fingerprint(settings, data.train.rows, () if data.held_out is None else data.held_out.rows, base),
        date,
    )


def recorded_date(out: Path) -> datetime | None:
    """The date with which the rows of an earlier training run in an output directory were made; None if not recorded.

    Raises:
        CheckpointError: its newest checkpoint is damaged.
    """
    newest = newest_in(checkpoints_directory(out))
    if newest is None or not (newest / STATE_FILE).is_file():
        return None
    date = _header_of(newest).get("date")
    try:
        return None if date is None else datetime.fromisoformat(date)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{newest}/{STATE_FILE}: damaged: {date!r} is not a date") from error


def newest_in(directory: Path) -> Path | None:
    """The checkpoint of the latest step in a directory; None if there is none."""
    steps = _steps_in(directory)
    return _path_in(directory, steps[-1]) if steps else None


class Checkpoints:
    """``step-000100`` and so on in one directory, created when the first is written.

    Args:
        directory: must have no other writer.
        keep: how many of the newest to keep, at least one, besides the best.
        fingerprint: of the run.
        date: the one that chat templates wrote into its rows.
    """

    def __init__(
        self, directory: Path, keep: int, fingerprint: Fingerprint, date: datetime | None = None
    ) -> None:
        self._directory = directory
        self._keep = max(keep, 1)
        self._fingerprint = fingerprint
        self._date = date

    def write(self, state: RunState, best_step: int | None) -> Path:
        """Write the state's checkpoint, and remove those no longer needed.

        Raises:
            CheckpointError: writing fails, such as on a full disk; earlier checkpoints remain.
        """
        path = _path_in(self._directory, state.step)
        with _failing_as_checkpoint("cannot be written", path):
            self._directory.mkdir(parents=True, exist_ok=True)
            remove_staged(self._directory)
            write_directory(path, encode(state, self._fingerprint, self._date))
            self._remove_old(best_step)
        return path

    def newest(self) -> Path | None:
        """The checkpoint of the latest step; None if there is none."""
        return newest_in(self._directory)

    def read_newest(self) -> RunState:
        """The state to resume from.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another training run; says how they differ.
        """
        path = self.newest()
        if path is None:
            raise CheckpointError(f"{self._directory} has no checkpoint to resume from")
        with _failing_as_checkpoint("cannot be read", path):
            files = {file.name: file.read_bytes() for file in path.iterdir()}
        if STATE_FILE not in files:
            raise CheckpointError(f"{path} is damaged: {STATE_FILE} is missing")
        check_same(decode_header(str(path), files[STATE_FILE])["fingerprint"], self._fingerprint, str(path))
        return decode(str(path), files)

    def clear(self) -> None:
        """Remove the checkpoints of a finished training run before another one begins here.

        Raises:
            CheckpointError: the run was not finished and could still be resumed; or they cannot be removed.
        """
        newest = self.newest()
        if newest is None:
            return
        if not _header_of(newest)["is_done"]:
            raise CheckpointError(
                f"{newest} is of an unfinished training run: resume it, or remove {self._directory} "
                "to start over"
            )
        for step in _steps_in(self._directory):
            path = _path_in(self._directory, step)
            with _failing_as_checkpoint("cannot be removed", path):
                remove_directory(path)

    def _remove_old(self, best_step: int | None) -> None:
        for step in _steps_in(self._directory)[: -self._keep]:
            if step != best_step:
                remove_directory(_path_in(self._directory, step))


def _header_of(checkpoint: Path) -> dict[str, Any]:
    with _failing_as_checkpoint("cannot be read", checkpoint):
        return decode_header(str(checkpoint), (checkpoint / STATE_FILE).read_bytes())


def _steps_in(directory: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    if not directory.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _path_in(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


@contextmanager
def _failing_as_checkpoint(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {what}: {error.strerror or error}") from error
