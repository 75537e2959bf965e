"""Checks that need no base, before it is loaded, which may take minutes."""

from __future__ import annotations

from pathlib import Path

from manyhats.trainer.data.task_data import check_first_rows
from manyhats.trainer.errors import CheckpointError, SettingError
from manyhats.trainer.files.output_directory import check_output_directory, checkpoints_directory
from manyhats.trainer.run.checkpoint import newest_in
from manyhats.trainer.settings.settings import TrainSettings


def check_before_loading(settings: TrainSettings, *, resume: bool = False) -> None:
    """Check the output directory, the artifact to start from, and the first row of each data source.

    Raises:
        SettingError: ``out`` or ``init_from``.
        CheckpointError: there is nothing to resume from.
        DataError: a source cannot be read, or its first row cannot be trained on.
    """
    if settings.out:
        out = Path(settings.out)
        check_output_directory(out)
        checkpoints = checkpoints_directory(out)
        if resume and newest_in(checkpoints) is None:
            raise CheckpointError(f"{checkpoints} has no checkpoint to resume from")
    if settings.init_from and not Path(settings.init_from).is_dir():
        raise SettingError("init_from", f"{settings.init_from}: is not a directory")
    data = settings.data
    check_first_rows(data, [source for source in (data.train, data.eval) if source])
