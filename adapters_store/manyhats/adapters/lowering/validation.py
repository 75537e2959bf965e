"""From opened sources to a version that can be served: every part read, checked and lowered, then composed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyhats.adapters.artifact import AdapterMethod, ArtifactPart
from manyhats.adapters.disk.files import SourceDirectory
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterNoEffectError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
    ArtifactError,
    BaseMismatchError,
)
from manyhats.adapters.formats.base_name import identity
from manyhats.adapters.formats.text_files import text_names
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.composition import compose_parts, part_name
from manyhats.adapters.lowering.lowering import check_lowered, has_effect
from manyhats.adapters.lowering.reader import ReadAdapter, read_adapter
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.probe import Probe
from manyhats.adapters.registration import Part, Parts, Registration
from manyhats.adapters.sites import BaseDescription


@dataclass(frozen=True, slots=True, eq=False)
class ValidVersion:
    """A version that passed every check and is not stored yet.

    Attributes:
        digest, method, parts, size_bytes, num_parameters, base_model, registered_for, notes, text: as in its
            record.
        lowered: what the engine will run.
        files: artifact digest → path inside it → content.
    """

    digest: str
    method: AdapterMethod
    parts: tuple[ArtifactPart, ...]
    size_bytes: int
    num_parameters: int
    base_model: str
    registered_for: tuple[str, ...]
    notes: tuple[str, ...]
    lowered: LoweredAdapter
    files: Mapping[str, Mapping[str, bytearray]]
    text: str


def validate(
    registration: Registration,
    directories: Sequence[SourceDirectory],
    base: BaseDescription,
    limits: AdapterLimits,
) -> ValidVersion:
    """Validate what is registered: one artifact, or each part, and that they can be combined exactly.

    Args:
        registration: what is asked for.
        directories: what its source names, open for reading; one for each part.
        base: what it is checked against.
        limits: how large it may be.

    Raises:
        ArtifactError, BaseMismatchError: it cannot be served on this base; of a part, ``subject`` begins with the
            part, ``parts[1]``.
    """
    if isinstance(registration.source, Parts):
        reads = _read_parts(directories, base, limits, assume_base=registration.assume_base)
        return _composed(registration.source.parts, reads, base, limits)
    (directory,) = directories
    read = read_adapter(directory, base, limits, assume_base=registration.assume_base)
    return _plain(registration.source_name, read, base)


def _plain(source: str, read: ReadAdapter, base: BaseDescription) -> ValidVersion:
    artifact = read.artifact
    return ValidVersion(
        digest=artifact.digest,
        method=artifact.method,
        parts=(ArtifactPart(artifact.digest, source=source, text_files=text_names(read.files)),),
        size_bytes=artifact.size_bytes,
        num_parameters=artifact.num_parameters,
        base_model=artifact.base_model,
        registered_for=identity(base),
        notes=read.notes,
        lowered=read.lowered,
        files={artifact.digest: read.files},
        text=read.text.fingerprint,
    )


def _composed(
    parts: Sequence[Part], reads: Sequence[ReadAdapter], base: BaseDescription, limits: AdapterLimits
) -> ValidVersion:
    lowered = compose_parts([read.lowered for read in reads], [part.weight for part in parts], limits)
    check_lowered(lowered)
    if not has_effect(lowered):
        raise AdapterNoEffectError("parts", "together change nothing")
    artifacts = [read.artifact for read in reads]
    return ValidVersion(
        digest=lowered.digest,
        method=AdapterMethod.COMPOSED,
        parts=tuple(
            ArtifactPart(read.artifact.digest, part.weight, part.uri, text_names(read.files))
            for read, part in zip(reads, parts, strict=True)
        ),
        size_bytes=sum(artifact.size_bytes for artifact in artifacts),
        num_parameters=sum(artifact.num_parameters for artifact in artifacts),
        base_model=next((artifact.base_model for artifact in artifacts if artifact.base_model), ""),
        registered_for=identity(base),
        notes=tuple(f"{part_name(i)}: {note}" for i, read in enumerate(reads) for note in read.notes),
        lowered=lowered,
        files={read.artifact.digest: read.files for read in reads},
        text=_common_text(reads),
    )


def measure(lowered: LoweredAdapter, probe: Probe) -> float:
    """How far an adapter moves the base's logits.

    Raises:
        AdapterInvalidError: the measure is not finite, or the probe refuses the adapter.
        AdapterNoEffectError: it does not move them.
    """
    if not lowered.deltas and lowered.prefix is None:
        return 0.0  # a head alone, which leaves the base as it is
    effect = probe(lowered)
    if not math.isfinite(effect):
        raise AdapterInvalidError("effect", "the logits with this adapter are not finite")
    if effect == 0:
        raise AdapterNoEffectError("effect", "the logits with this adapter are the base's own")
    return effect


def _read_parts(
    directories: Sequence[SourceDirectory],
    base: BaseDescription,
    limits: AdapterLimits,
    *,
    assume_base: bool,
) -> list[ReadAdapter]:
    reads: list[ReadAdapter] = []
    total = 0
    for i, directory in enumerate(directories):
        try:
            read = read_adapter(directory, base, limits, assume_base=assume_base)
        except (ArtifactError, BaseMismatchError) as error:
            raise of_part(i, error) from error
        total += read.artifact.size_bytes
        if total > limits.max_size_bytes:
            raise AdapterTooLargeError(
                part_name(i),
                f"brings the parts to {total} bytes in total; the limit is {limits.max_size_bytes}",
            )
        reads.append(read)
    return reads


def _common_text(reads: Sequence[ReadAdapter]) -> str:
    """What the parts' text files mean together: all parts that differ from the base must agree.

    Raises:
        AdapterUnsupportedError: they do not; ``subject`` is a part.
    """
    own = [(i, read) for i, read in enumerate(reads) if read.text.fingerprint]
    for i, read in own[1:]:
        first, other = own[0]
        if read.text.fingerprint != other.text.fingerprint:
            raise AdapterUnsupportedError(
                part_name(i),
                f"reads and writes text differently from {part_name(first)} ({', '.join(text_names(read.files))}); "
                "parts must agree on chat template and tokens, or have no text files of their own",
            )
    return own[0][1].text.fingerprint if own else ""


def of_part(index: int, error: AdapterError) -> AdapterError:
    """The same error, with the part's name before its subject."""
    return type(error)(f"{part_name(index)} {error.subject}", error.description)
