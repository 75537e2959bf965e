"""From a directory to a validated artifact: config, header, checks, tensors, lowering, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact
from manyhats.adapters.disk.digest import artifact_digest
from manyhats.adapters.disk.files import SourceDirectory, SourceFile
from manyhats.adapters.errors import AdapterInvalidError, AdapterNoEffectError
from manyhats.adapters.formats.adapterhub.format import HEAD_CONFIG_FILE, HEAD_FILES, HEAD_WEIGHTS_FILE
from manyhats.adapters.formats.artifact_files import max_bytes_of
from manyhats.adapters.formats.base_name import check_base_name
from manyhats.adapters.formats.json_reader import parse_json_object
from manyhats.adapters.formats.peft.format import CONFIG_FILE, check_directory
from manyhats.adapters.formats.recognition import (
    base_name_key,
    recognise,
    recorded_base,
    weights_file,
)
from manyhats.adapters.formats.safetensors_reader import (
    LENGTH_BYTES,
    SafetensorsHeader,
    header_size,
    parse_header,
    read_tensors,
)
from manyhats.adapters.formats.text_files import check_rows, check_text, read_text
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import check, check_lowered, has_effect, is_finite, lower, method_of
from manyhats.adapters.method import Candidate
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription, TextFacts


@dataclass(frozen=True, slots=True, eq=False)
class ReadAdapter:
    """A validated artifact and the bytes it was read from.

    Attributes:
        artifact: config and tensors.
        lowered: the same as primitives of the base.
        files: path inside the artifact → content; what the store keeps.
        notes: what the operator should know.
        text: what its text files mean on the base.
    """

    artifact: AdapterArtifact
    lowered: LoweredAdapter
    files: Mapping[str, bytearray]
    notes: tuple[str, ...]
    text: TextFacts


def read_adapter(
    directory: SourceDirectory, base: BaseDescription, limits: AdapterLimits, *, assume_base: bool = False
) -> ReadAdapter:
    """Read and validate an untrusted directory. The last step lowers it, so what passes can be served.

    Args:
        directory: with the artifact's files.
        base: what it is checked against.
        limits: how large it may be.
        assume_base: it is meant for this base, whatever base it names.

    Raises:
        ArtifactError: it can never be served as it is; names the file, tensor or key.
        BaseMismatchError: it was made for another base.
    """
    check_directory(directory)
    with directory.open_file(CONFIG_FILE, max_bytes_of(CONFIG_FILE, limits)) as file:
        config_bytes = file.read()
    config = _parse_config(config_bytes, limits)
    method = method_of(recognise(config), config)
    base_model = recorded_base(config)
    notes = check_base_name(base_model, base, base_name_key(config), assume_base=assume_base)
    weights_name = weights_file(config, directory.names())
    head_files = read_head(directory, limits, limits.max_size_bytes - len(config_bytes))
    num_bytes = sum(map(len, (config_bytes, *head_files.values())))
    with directory.open_file(weights_name, limits.max_size_bytes - num_bytes) as file:
        shapes = _read_shapes(file, limits)
        check(_candidate(config, shapes, base_model, head_files, limits), method, base, limits)
        weights = file.read()
    files = {CONFIG_FILE: config_bytes, weights_name: weights, **head_files}
    files |= read_text(directory, limits.max_size_bytes - num_bytes - len(weights))
    artifact = parse_artifact(files, artifact_digest(files), limits)
    check_finite(artifact.tensors)
    check_finite(artifact.head_tensors)
    lowered = lower(artifact, base)
    check_lowered(lowered)
    if not has_effect(lowered):
        raise AdapterNoEffectError(weights_name, "changes nothing: all its deltas are zero")
    text = check_text(files, base.check_text)
    check_rows(text, lowered.vocab_size or base.vocab_size)
    return ReadAdapter(artifact, lowered, files, (*notes, *text.notes), text)


def parse_artifact(files: Mapping[str, bytearray], digest: str, limits: AdapterLimits) -> AdapterArtifact:
    """Parse an artifact's files, whose digest is ``digest``; its tensors are views of them.

    Raises:
        ArtifactError: they are malformed.
    """
    config = _parse_config(files[CONFIG_FILE], limits)
    name = weights_file(config, list(files))
    tensors = read_tensors(_parse_header(name, files[name], limits), files[name])
    head_config, head = None, files.get(HEAD_WEIGHTS_FILE)
    head_tensors = {} if head is None else read_tensors(_parse_header(HEAD_WEIGHTS_FILE, head, limits), head)
    if head is not None:
        head_config = _parse_config(files[HEAD_CONFIG_FILE], limits, HEAD_CONFIG_FILE)
    return AdapterArtifact(
        digest=digest,
        method=recognise(config),
        config=config,
        tensors=tensors,
        base_model=recorded_base(config),
        size_bytes=sum(len(content) for content in files.values()),
        num_parameters=sum(tensor.numel() for tensor in (*tensors.values(), *head_tensors.values())),
        head_config=head_config,
        head_tensors=head_tensors,
    )


def read_head(directory: SourceDirectory, limits: AdapterLimits, max_bytes: int) -> dict[str, bytearray]:
    """The files of a head that was saved beside an adapter, by name; none if it has none.

    Args:
        directory: of an artifact.
        limits: how large it may be.
        max_bytes: of both together.

    Raises:
        AdapterError: one is not a regular file, is over a limit, or cannot be read.
    """
    files = {}
    for name in HEAD_FILES:
        if name in directory.names():
            with directory.open_file(name, min(max_bytes_of(name, limits), max_bytes)) as file:
                files[name] = file.read()
            max_bytes -= len(files[name])
    return files


def _candidate(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    base_model: str,
    head_files: Mapping[str, bytearray],
    limits: AdapterLimits,
) -> Candidate:
    if not head_files:
        return Candidate(config, shapes, base_model)
    header = _parse_header(HEAD_WEIGHTS_FILE, head_files[HEAD_WEIGHTS_FILE], limits)
    return Candidate(
        config,
        shapes,
        base_model,
        _parse_config(head_files[HEAD_CONFIG_FILE], limits, HEAD_CONFIG_FILE),
        {name: spec.shape for name, spec in header.tensors.items()},
    )


def _parse_header(name: str, content: bytearray, limits: AdapterLimits) -> SafetensorsHeader:
    size = header_size(bytes(content[:LENGTH_BYTES]), len(content), name, limits)
    return parse_header(bytes(content[:size]), len(content), name, limits)


def _parse_config(data: bytearray, limits: AdapterLimits, name: str = CONFIG_FILE) -> dict[str, Any]:
    return parse_json_object(
        bytes(data), name, max_bytes=limits.max_config_bytes, max_depth=limits.max_config_depth
    )


def _read_shapes(file: SourceFile, limits: AdapterLimits) -> dict[str, tuple[int, ...]]:
    """Tensor shapes, from the header alone."""
    size = header_size(file.read_start(LENGTH_BYTES), file.size_bytes, file.name, limits)
    header = parse_header(file.read_start(size), file.size_bytes, file.name, limits)
    return {name: spec.shape for name, spec in header.tensors.items()}


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse values that are not finite.

    Raises:
        AdapterInvalidError: names the tensor.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise AdapterInvalidError(name, "has values that are not finite")
