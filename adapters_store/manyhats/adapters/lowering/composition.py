"""A version as one adapter: its artifacts lowered; of several, at most one has a prefix, and the deltas add up exactly.

Each *place* (a linear, a sub-layer's output, the embedding, the head) that only one part acts on keeps that part's
deltas. If several parts meet, ``combined_deltas`` says what can be combined; anything else is refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterRecord
from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, AdapterUnsupportedError
from manyhats.adapters.formats.base_name import check_base_name, is_registered_for
from manyhats.adapters.formats.recognition import base_name_key
from manyhats.adapters.heads import TaskHead
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.combined_deltas import NotCombinableError, combine_deltas
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    InputScale,
    KVPrefix,
    LoweredAdapter,
    LowRank,
    PrefixGate,
    PromptEmbeddings,
    site_of,
)
from manyhats.adapters.sites import BaseDescription, Site

_MAX_WEIGHT = 1e6


@dataclass(frozen=True, slots=True, eq=False)
class AdapterPart:
    """One adapter of a composition.

    Attributes:
        name: how errors name it, such as ``parts[1]``.
        adapter: lowered for the same base as the other parts.
        weight: scales its deltas; may be negative. Must be 1 if a weight has no meaning.
    """

    name: str
    adapter: LoweredAdapter
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    """A weighted delta and the part that it comes from."""

    part: AdapterPart
    delta: Delta


def composed_digest(parts: Iterable[tuple[str, float]]) -> str:
    """Names a composition by its parts' digests and weights; their order does not matter.

    SHA-256 over one line per part, sorted, after a first line that distinguishes it from an artifact's digest.

    Args:
        parts: digest and weight of each.

    Returns:
        ``sha256:`` and 64 hexadecimal digits.
    """
    lines = sorted(f"{digest} {float(weight).hex()}\n" for digest, weight in parts)
    return "sha256:" + hashlib.sha256("".join(("composed\n", *lines)).encode()).hexdigest()


def compose(parts: Sequence[AdapterPart], limits: AdapterLimits) -> LoweredAdapter:
    """Combine parts into one adapter: ``Σ weight · delta`` of the deltas, and the one prefix.

    The parts' order does not change a bit of the result.

    Args:
        parts: from 1 to ``limits.max_parts``.
        limits: ``max_rank`` bounds the ranks of one place together.

    Raises:
        AdapterInvalidError: no part, or a weight that is 0, not finite or over 1e6 in magnitude.
        AdapterUnsupportedError: the parts cannot be combined exactly; ``subject`` is a part's name.
        AdapterTooLargeError: too many parts, or too large a rank together.
    """
    if not parts:
        raise AdapterInvalidError("parts", "is empty; a composed task has at least one part")
    if len(parts) > limits.max_parts:
        raise AdapterTooLargeError("parts", f"has {len(parts)} entries; the limit is {limits.max_parts}")
    by_place: dict[Site, list[_Placed]] = {}
    for part in parts:
        _check_weight(part)
        for delta in part.adapter.deltas:
            by_place.setdefault(site_of(delta), []).append(_Placed(part, _weighted(part, delta)))
    combined = [_combine_place(place, by_place[place], limits) for place in sorted(by_place)]
    return LoweredAdapter(
        digest=composed_digest((part.adapter.digest, part.weight) for part in parts),
        deltas=tuple(delta for deltas in combined for delta in deltas),
        prefix=_only_prefix(parts),
        head=_only_head(parts),
        vocab_size=_only_vocabulary(parts),
    )


def _check_weight(part: AdapterPart) -> None:
    if not math.isfinite(part.weight) or abs(part.weight) > _MAX_WEIGHT:
        raise AdapterInvalidError(
            part.name,
            f"has the weight {part.weight}; it must be finite and at most {_MAX_WEIGHT:g} in magnitude",
        )
    if part.weight == 0:
        raise AdapterInvalidError(part.name, "has the weight 0, so it changes nothing; leave it out")
    if part.weight != 1 and part.adapter.prefix is not None:
        raise _refuse_weight(part, "for virtual tokens")


def _refuse_weight(part: AdapterPart, where: str) -> AdapterUnsupportedError:
    return AdapterUnsupportedError(
        part.name, f"has the weight {part.weight}, which has no meaning {where}; only 1 is served"
    )


def _only_prefix(parts: Sequence[AdapterPart]) -> KVPrefix | PromptEmbeddings | None:
    prefixed = [part for part in parts if part.adapter.prefix is not None]
    if len(prefixed) > 1:
        raise AdapterUnsupportedError(
            prefixed[1].name, f"has virtual tokens, and so has {prefixed[0].name}; at most one part may"
        )
    return prefixed[0].adapter.prefix if prefixed else None


def _only_head(parts: Sequence[AdapterPart]) -> TaskHead | None:
    """The head that a part brings, or else what parts without a head of their own do with texts."""
    heads = [part.adapter.head for part in parts if part.adapter.head is not None]
    headed = [part for part in parts if part.adapter.head is not None and part.adapter.head.layers]
    if len(headed) > 1:
        raise AdapterUnsupportedError(
            headed[1].name, f"has a head, and so has {headed[0].name}; at most one part may"
        )
    return headed[0].adapter.head if headed else next(iter(heads), None)


def _only_vocabulary(parts: Sequence[AdapterPart]) -> int | None:
    own = [part for part in parts if part.adapter.vocab_size is not None]
    if len(own) > 1:
        raise AdapterUnsupportedError(
            own[1].name, f"has tokens of its own, and so has {own[0].name}; at most one part may"
        )
    return own[0].adapter.vocab_size if own else None


def _weighted(part: AdapterPart, delta: Delta) -> Delta:
    """A delta times its part's weight, if it only adds something."""
    if part.weight == 1:
        return delta
    match delta:
        case LowRank() | EmbeddingLowRank():
            return replace(delta, scale=delta.scale * part.weight)
        case Affine(scale=None, offset=Tensor() as offset):
            return replace(delta, offset=offset.float() * part.weight)
        case Bottleneck(norm_after=None, keep=1.0, carry=0.0, carry_normed=0.0, skips_norm=False):
            return replace(delta, scale=delta.scale.float() * part.weight)
    raise _refuse_weight(part, f"for {_kind(delta)} at {site_of(delta)}")


def _kind(delta: Delta) -> str:
    """A delta's name in messages."""
    match delta:
        case LowRank() | EmbeddingLowRank():
            return "a low-rank delta"
        case Affine(scale=None):
            return "an offset"
        case Affine(offset=None) | InputScale():
            return "a rescaling"
        case Affine():
            return "a rescaling with an offset"
        case Bottleneck():
            return "a bottleneck"
        case PrefixGate():
            return "a gate of a prefix"
        case EmbeddingRows() | HeadRows():
            return "rows in place of the base's"
        case HeadWeight():
            return "a weight in place of the base's"


def _combine_place(place: Site, placed: Sequence[_Placed], limits: AdapterLimits) -> Sequence[Delta]:
    """The deltas of one place as one adapter's, whatever the order of the parts."""
    first = placed[0].part
    if all(each.part is first for each in placed):
        return [each.delta for each in placed]
    ordered = sorted(placed, key=lambda each: (each.part.adapter.digest, each.part.weight))
    try:
        combined = combine_deltas([each.delta for each in ordered])
    except NotCombinableError as error:
        raise _refuse_meeting(place, placed, str(error)) from None
    rank = sum(_rank(delta) for delta in combined)
    if rank > limits.max_rank:
        raise AdapterTooLargeError(
            placed[-1].part.name,
            f"brings the parts' rank at {place} to {rank} in total; the limit is {limits.max_rank}",
        )
    return combined


def _rank(delta: Delta) -> int:
    match delta:
        case LowRank():
            return delta.rank
        case EmbeddingLowRank():
            return int(delta.a.shape[1])
    return 0


def _refuse_meeting(place: Site, placed: Sequence[_Placed], why: str) -> AdapterUnsupportedError:
    """Name the second part that acts at a place, what it does there, and what the first does."""
    first = placed[0].part
    second = next(each.part for each in placed if each.part is not first)
    mine, others = (
        " and ".join(_kind(each.delta) for each in placed if each.part is part) for part in (second, first)
    )
    return AdapterUnsupportedError(
        second.name,
        f"cannot be combined exactly with {first.name}: at {place} it has {mine}, the other has {others}, "
        f"and {why}",
    )


@dataclass(frozen=True, slots=True, eq=False)
class LoadedVersion:
    """A version's record and its artifacts, one per part and in the order of ``record.parts``."""

    record: AdapterRecord
    artifacts: tuple[AdapterArtifact, ...]


def lower_version(version: LoadedVersion, base: BaseDescription, limits: AdapterLimits) -> LoweredAdapter:
    """The version as primitives of the base's sites; its digest is the record's.

    Raises:
        ArtifactError: it cannot be served exactly.
        BaseMismatchError: it was made for another base.
    """
    # Registration compared the names; whether a path exists, or what the operator said, is not asked again.
    strangers = () if is_registered_for(version.record.registered_for, base) else version.artifacts
    for artifact in strangers:
        check_base_name(artifact.base_model, base, base_name_key(artifact.config))
    lowered = [lower(artifact, base) for artifact in version.artifacts]
    if not version.record.is_composed:
        return lowered[0]
    weights = [part.weight for part in version.record.parts]
    return compose_parts(lowered, weights, limits)


def compose_parts(
    adapters: Sequence[LoweredAdapter], weights: Sequence[float], limits: AdapterLimits
) -> LoweredAdapter:
    """``compose``, with errors naming parts by position: ``parts[0]`` and so on."""
    pairs = zip(adapters, weights, strict=True)
    parts = [AdapterPart(part_name(i), adapter, weight) for i, (adapter, weight) in enumerate(pairs)]
    return compose(parts, limits)


def part_name(index: int) -> str:
    """How errors and notes name a part."""
    return f"parts[{index}]"
