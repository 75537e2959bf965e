"""The steps of the image run in a clean Debian, and its server in the result: needs root, and no container engine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.dockerfile import ROOT, Stage, stages

_MIRROR = "http://deb.debian.org/debian"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAMS = ("debootstrap", "unshare", "chroot", "mount")
# Which Debian each base is, and what it has besides Debian's smallest system.
_BASES = {"python:3.11-slim-bookworm": ("bookworm", "python3,python3-venv,ca-certificates")}


def missing() -> str:
    """Why a clean root cannot be made here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, for debootstrap and chroot"
    lacking = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"needs {', '.join(lacking)} (Debian's package debootstrap)" if lacking else ""


def download_wheels(directory: Path) -> None:
    """All that the steps install by pip, as this machine's pip finds it."""
    (project,) = {
        word.strip("'")
        for stage in stages()
        for name, rest in stage.instructions
        for word in rest.split()
        if name == "RUN" and word.startswith("'.[")
    }
    to_build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    command = [sys.executable, "-m", "pip", "download", "-qq", "--dest", str(directory)]
    subprocess.run([*command, "-c", "constraints.txt", "torch", project, *to_build], cwd=ROOT, check=True)


class CleanImage:
    """The image's file system, made in a directory by the Dockerfile's own steps.

    Args:
        directory: on a file system that takes device files.
        wheels: what pip installs from, instead of an index.
    """

    def __init__(self, directory: Path, wheels: Path) -> None:
        self._directory = directory
        self._wheels = wheels
        build, self._stage = stages()
        base = self._bootstrap(build.base)
        assert self._stage.base == build.base
        self._run_stage(build, self._copy(base, "build"), {"TORCH_ARGS": "", "PIP_ARGS": ""})
        self.root = self._copy(base, "image")
        self._run_stage(self._stage, self.root, {})
        (self.root / "dev/shm").mkdir(exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        """What the image sets."""
        own = {name: value.replace("$PATH", _PATH) for name, value in self._stage.variables.items()}
        return {"PATH": _PATH, **own}

    @property
    def user(self) -> str:
        """As ``uid:gid``."""
        return self._stage.last("USER")

    def _bootstrap(self, base: str) -> Path:
        suite, packages = _BASES[base]
        target = self._directory / "base"
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={packages}", suite, str(target), _MIRROR],
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
        for name in ("python", "python3"):
            (target / "usr/local/bin" / name).symlink_to("/usr/bin/python3")
        shutil.copy("/etc/resolv.conf", target / "etc/resolv.conf")
        return target

    def _copy(self, base: Path, name: str) -> Path:
        target = self._directory / name
        subprocess.run(["cp", "-a", "--reflink=auto", str(base), str(target)], check=True)
        return target

    def _run_stage(self, stage: Stage, root: Path, arguments: Mapping[str, str]) -> None:
        environment, folder = {"PATH": _PATH, **arguments}, "/"
        for name, rest in stage.instructions:
            match name:
                case "RUN":
                    self._run_step(root, rest, environment, folder)
                case "COPY":
                    self._copy_step(root, rest.split(), folder)
                case "ENV":
                    environment |= {
                        key: value.replace("$PATH", environment["PATH"])
                        for key, value in Stage("", [(name, rest)]).variables.items()
                    }
                case "WORKDIR":
                    folder = rest
                    (root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _run_step(self, root: Path, command: str, environment: Mapping[str, str], folder: str) -> None:
        from_wheels = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/mnt"}
        script = f"mount --bind {self._wheels} {root}/mnt && exec chroot {root} /usr/bin/env -i "
        words = [f"{name}={value}" for name, value in {**environment, **from_wheels}.items()]
        quoted = " ".join(f"'{word}'" for word in [*words, "/bin/sh", "-c"])
        done = subprocess.run(
            [*_namespace(root), "sh", "-e", "-c", f'{script} {quoted} "$0"', f"cd {folder} && {command}"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"RUN {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def _copy_step(self, root: Path, words: Sequence[str], folder: str) -> None:
        origin = ROOT
        if words[0].startswith("--from="):
            origin, words = self._directory / words[0].removeprefix("--from="), words[1:]
        *sources, target = words
        place = root / Path(folder, target).relative_to("/")
        for source in sources:
            path = origin / source.lstrip("/")
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, place, symlinks=True, dirs_exist_ok=True, ignore=ignored)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)

    def command(self, volume: Path, model: Path, words: Sequence[str], **variables: str) -> list[str]:
        """A command in the image as a container runs it: its own user, a read-only root, a volume and /tmp.

        Args:
            volume: mounted where the image keeps its data; empty, as Kubernetes' volumes are.
            model: a model's directory, seen as ``/mnt``.
            words: the command.
            variables: besides the image's.
        """
        root, data = self.root, self._stage.last("VOLUME")
        mounts = (
            f"mount --bind {root} {root}",
            f"mount -o remount,bind,ro {root}",
            f"mount -t proc proc {root}/proc",
            f"mount -t tmpfs tmpfs {root}/tmp",
            f"mount -t tmpfs -o mode=1777 tmpfs {root}/dev/shm",  # as every container has it
            f"mount --bind {volume} {root}{data}",
            f"mount --bind {model} {root}/mnt",
        )
        given = " ".join(f"'{name}={value}'" for name, value in {**self.environment, **variables}.items())
        enter = f'exec chroot --userspec={self.user} {root} /usr/bin/env -i {given} "$@"'
        namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return [*namespace, "sh", "-e", "-c", "\n".join([*mounts, enter]), "sh", *words]

    @contextmanager
    def serving(
        self, volume: Path, model: Path, *flags: str, **variables: str
    ) -> Iterator[subprocess.Popen[str]]:
        """The image's entry point with flags, until the block ends."""
        words = [*self._stage.entry_point, *flags]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self.command(volume, model, words, **variables), stdout=pipe, stderr=pipe, text=True
        ) as process:
            try:
                yield process
            finally:
                process.send_signal(signal.SIGKILL)

    def check_health(self, **variables: str) -> int:
        """The exit code of the image's health check, as it runs beside a server."""
        given = [f"{name}={value}" for name, value in {**self.environment, **variables}.items()]
        enter = ["chroot", f"--userspec={self.user}", str(self.root), "/usr/bin/env", "-i"]
        return subprocess.run([*enter, *given, *self._stage.health_check]).returncode


def _namespace(root: Path) -> list[str]:
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={root}/proc"]
