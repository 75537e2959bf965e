"""What a training run leaves in its output directory, which can be registered as it is.

``adapter_config.json``, the safetensors file and text files are the artifact, ``README.md`` is its model card; the rest
is in ``training/``, where a server does not look.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from manyhats.adapters.formats.adapterhub.format import HEAD_FILES
from manyhats.adapters.formats.text_files import MAX_BYTES
from manyhats.trainer.errors import OutputError, SettingError
from manyhats.trainer.files.durable import remove_staged, sync, write_files

CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"
_OTHER_FILES = frozenset({"adapter_model.safetensors", "adapter.safetensors", *HEAD_FILES, *MAX_BYTES})
_TRAINING = "training"
_REPORT_FILE = "report.json"
_CURVE_FILE = "loss.png"


def checkpoints_directory(out: Path) -> Path:
    """Where checkpoints are kept."""
    return out / _TRAINING / "checkpoints"


def tensorboard_directory(out: Path) -> Path:
    """Where TensorBoard events are written."""
    return out / _TRAINING / "tensorboard"


def report_file(out: Path) -> Path:
    """The report as JSON."""
    return out / _TRAINING / _REPORT_FILE


def check_output_directory(out: Path) -> None:
    """Check that only files left by a training run would be overwritten.

    Raises:
        SettingError: ``out`` has files, and no training run was ever there.
        OutputError: it cannot be read.
    """
    with _failing_as_output(out):
        if not out.is_dir() or (out / _TRAINING).is_dir():
            return
        foreign = sorted(name for name in os.listdir(out) if not name.startswith("."))
    if foreign:
        raise SettingError(
            "out", f"{out} has {foreign[0]}, which is not from a training run; choose another directory"
        )


def holds_artifact(out: Path) -> bool:
    """Whether there is an artifact, which training will replace."""
    return (out / CONFIG_FILE).exists()


def make_output_directory(out: Path) -> None:
    """Create the directory and check that it can be written, before hours of training.

    Raises:
        SettingError: ``out`` has files that are not from a training run.
        OutputError: it cannot be created or written.
    """
    check_output_directory(out)
    with _failing_as_output(out):
        (out / _TRAINING).mkdir(parents=True, exist_ok=True)
        for directory in (out, out / _TRAINING):
            remove_staged(directory)
            sync(directory)
        write_files(out / _TRAINING, {".writable": b""})
        os.unlink(out / _TRAINING / ".writable")


def remove_if_empty(out: Path) -> None:
    """Remove what ``make_output_directory`` created, if nothing was put into it."""
    for directory in (tensorboard_directory(out), out / _TRAINING, out):
        with suppress(OSError):
            directory.rmdir()


def write_artifact(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the artifact's files; whatever fails, the directory never has half of this artifact.

    The config makes the directory an artifact, so it is written last. Another artifact's config is removed before its
    weights are replaced.

    Args:
        out: may have an earlier artifact.
        files: by name, including the config.

    Raises:
        OutputError: they cannot be written.
    """
    config = files[CONFIG_FILE]
    weights = {name: content for name, content in files.items() if name != CONFIG_FILE}
    others = _OTHER_FILES - weights.keys()
    with _failing_as_output(out):
        # Weights alone can be replaced in one step; other files change what the artifact is.
        is_alone = len(weights) == 1 and not any((out / name).exists() for name in others)
        if is_alone and _content(out / CONFIG_FILE) == config:
            write_files(out, weights, replaced=others)
        else:
            write_files(out, {**weights, CONFIG_FILE: config}, replaced=(CONFIG_FILE, *others))


def write_report(out: Path, report: bytes, curve: bytes, card: str) -> None:
    """Write ``training/report.json``, ``training/loss.png`` and ``README.md``.

    Raises:
        OutputError: they cannot be written; the artifact is already there.
    """
    with _failing_as_output(out):
        write_files(out / _TRAINING, {_REPORT_FILE: report, _CURVE_FILE: curve})
        write_files(out, {CARD_FILE: card.encode()})


@contextmanager
def _failing_as_output(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}") from error


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
