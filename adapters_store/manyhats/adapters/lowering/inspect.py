"""What an adapter's directory holds, and what would be refused; needs neither a server nor a base model."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact
from manyhats.adapters.disk.digest import artifact_digest
from manyhats.adapters.disk.files import SourceDirectory, open_local
from manyhats.adapters.errors import AdapterError, AdapterNoEffectError, StoreError
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.base_name import check_base_name, public_name
from manyhats.adapters.formats.json_reader import parse_json_object
from manyhats.adapters.formats.peft.format import CONFIG_FILE, check_directory
from manyhats.adapters.formats.recognition import base_name_key, recognise, recorded_base, weights_file
from manyhats.adapters.formats.text_files import check_rows, check_text, read_text
from manyhats.adapters.heads import TaskKind
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.inspected_base import infer_base, stand_in_weights
from manyhats.adapters.lowering.lowering import check, has_effect, lower, method_of
from manyhats.adapters.lowering.reader import check_finite, parse_artifact, read_head
from manyhats.adapters.method import Candidate
from manyhats.adapters.primitives import Delta, KVPrefix, LoweredAdapter, PromptEmbeddings, num_tokens
from manyhats.adapters.sites import BaseDescription, TextFacts

# What names a primitive's rank, or its bottleneck size.
_RANKED = ("a", "down")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why registration would refuse it: the API's reason, the file, tensor or key at fault, and a sentence."""

    reason: str
    subject: str
    description: str


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """What the adapter does at one kind of place.

    Attributes:
        site: such as ``q_proj``, ``feed_forward``, ``experts.*.up_proj`` or ``embed_tokens``.
        operation: the primitive, such as ``LowRank``.
        layers: the layers in which it does this; empty outside the layers.
        ranks: the low ranks or bottleneck sizes that occur, ascending.
        shapes: the primitive's tensor → its shapes that occur.
    """

    site: str
    operation: str
    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything a directory reveals about itself; fields are empty or None if it does not.

    Attributes:
        path: the directory.
        format: ``peft``, ``adapterhub`` or empty.
        method: as the API names it, in lower case; empty if it is not served.
        kind: what its task does with a text, as ``TaskKind`` names it.
        num_outputs: of its head; 0 if it has none.
        base_model: what it names as its base.
        compared_with: the base it was checked against; empty for none.
        digest: the one registration would give it.
        size_bytes: of config and tensors.
        num_virtual_tokens: P of its prefix.
        config: the parsed ``adapter_config.json``.
        text_files: those that determine how its task reads and writes text, such as a chat template.
        refusals: why registration would refuse it; empty if it would not.
    """

    path: str
    format: str = ""
    method: str = ""
    kind: str = ""
    num_outputs: int = 0
    base_model: str = ""
    compared_with: str = ""
    digest: str = ""
    size_bytes: int = 0
    num_parameters: int = 0
    num_virtual_tokens: int = 0
    sites: tuple[SiteFacts, ...] = ()
    tensors: tuple[TensorFacts, ...] = ()
    config: Mapping[str, Any] | None = None
    text_files: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()


def inspect(
    path: Path, base: BaseDescription | None = None, limits: AdapterLimits | None = None
) -> Inspection:
    """Inspect a directory as registration would, continuing past anything it would refuse.

    Args:
        path: the directory.
        base: compared with if given; without one, whatever only a base can tell is left out.
        limits: how large an adapter may be.

    Raises:
        SourceNotFoundError: there is no such directory.
        StoreError: the disk fails.
    """
    inspector = _Inspector(base, limits or AdapterLimits())
    with open_local(path) as directory:
        inspector.look_at(directory)
    return replace(inspector.facts, path=os.path.realpath(path), refusals=tuple(inspector.refusals))


class _Inspector:
    """Collects facts and refusals, stage by stage; a stage that is refused ends those that build on it."""

    def __init__(self, base: BaseDescription | None, limits: AdapterLimits) -> None:
        self._base = base
        self._limits = limits
        self._text = TextFacts()
        self._vocab_size = None if base is None else base.vocab_size
        self.facts = Inspection(path="")
        self.refusals: list[Refusal] = []

    def look_at(self, directory: SourceDirectory) -> None:
        with self._stage():
            check_directory(directory)
        config: dict[str, Any] | None = None
        if CONFIG_FILE not in directory.names():
            return  # as the first stage said
        with self._stage():
            config_bytes = _read(directory, CONFIG_FILE, self._limits.max_config_bytes)
            config = self._look_at_config(config_bytes)
        with self._stage():
            # If there is only a pickle, the first stage said so.
            if config is not None and any(name.endswith(".safetensors") for name in directory.names()):
                name = weights_file(config, directory.names())
                files = {CONFIG_FILE: config_bytes, name: _read(directory, name, self._limits.max_size_bytes)}
                files |= read_head(directory, self._limits, self._limits.max_size_bytes)
                files |= self._look_at_text(directory)
                self._look_at_tensors(files, config)
        with self._stage():
            if self._vocab_size is not None:
                check_rows(self._text, self._vocab_size)

    def _look_at_config(self, content: bytearray) -> dict[str, Any]:
        limits = self._limits
        config = parse_json_object(
            bytes(content),
            CONFIG_FILE,
            max_bytes=limits.max_config_bytes,
            max_depth=limits.max_config_depth,
        )
        is_adapterhub = adapterhub_format.is_adapterhub(config)
        library = "adapterhub" if is_adapterhub else "peft" if "peft_type" in config else ""
        self.facts = replace(self.facts, config=config, format=library, size_bytes=len(content))
        with self._stage():
            self.facts = replace(self.facts, base_model=recorded_base(config))
            if self._base is not None:
                notes = check_base_name(self.facts.base_model, self._base, base_name_key(config))
                self.facts = replace(self.facts, notes=notes)
        with self._stage():
            self.facts = replace(self.facts, method=recognise(config).value)
        return config

    def _look_at_text(self, directory: SourceDirectory) -> dict[str, bytearray]:
        files: dict[str, bytearray] = {}
        with self._stage():
            files = read_text(directory, self._limits.max_size_bytes)
            self.facts = replace(self.facts, text_files=tuple(files))
            found = self._text = check_text(files, None if self._base is None else self._base.check_text)
            self.facts = replace(self.facts, notes=(*self.facts.notes, *found.notes))
        return files

    def _look_at_tensors(self, files: Mapping[str, bytearray], config: Mapping[str, Any]) -> None:
        digest = artifact_digest(files)
        self.facts = replace(
            self.facts, digest=digest, size_bytes=sum(len(content) for content in files.values())
        )
        artifact = parse_artifact(files, digest, self._limits)
        self.facts = replace(
            self.facts,
            num_parameters=artifact.num_parameters,
            tensors=tuple(_tensor_facts(name, tensor) for name, tensor in sorted(artifact.tensors.items())),
        )
        with self._stage():
            check_finite(artifact.tensors)
            check_finite(artifact.head_tensors)
        self._look_at_method(artifact, config)

    def _look_at_method(self, artifact: AdapterArtifact, config: Mapping[str, Any]) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
        base = self._base or infer_base(config, shapes, artifact.base_model)
        if base.weights is None:
            base = replace(base, weights=stand_in_weights(base))
        if self._base is None:
            note = "nothing was compared with a base model; only the adapter itself was checked"
            self.facts = replace(self.facts, notes=(*self.facts.notes, note))
        else:
            self.facts = replace(
                self.facts, compared_with=public_name(base) or min(base.names, default=base.model_type)
            )
        method = method_of(artifact.method, config)
        head_shapes = {name: tuple(tensor.shape) for name, tensor in artifact.head_tensors.items()}
        candidate = Candidate(config, shapes, artifact.base_model, artifact.head_config, head_shapes)
        check(candidate, method, base, self._limits)
        lowered = lower(artifact, base)
        self._vocab_size = num_tokens(lowered.deltas, base.vocab_size)
        head = lowered.head
        self.facts = replace(
            self.facts,
            kind=(TaskKind.GENERATE if head is None else head.kind).value,
            num_outputs=0 if head is None else head.num_outputs,
            sites=_site_facts(lowered.deltas),
            num_virtual_tokens=_num_virtual_tokens(lowered),
        )
        if not has_effect(lowered):
            raise AdapterNoEffectError(artifact.method.value, "changes nothing: all its deltas are zero")

    @contextmanager
    def _stage(self) -> Iterator[None]:
        """Record an error as a refusal, unless it was already recorded."""
        try:
            yield
        except StoreError:
            raise
        except AdapterError as error:
            refusal = Refusal(error.reason, error.subject, error.description)
            if refusal not in self.refusals:
                self.refusals.append(refusal)


def _read(directory: SourceDirectory, name: str, max_bytes: int) -> bytearray:
    with directory.open_file(name, max_bytes) as file:
        return file.read()


def _tensor_facts(name: str, tensor: Tensor) -> TensorFacts:
    return TensorFacts(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _num_virtual_tokens(lowered: LoweredAdapter) -> int:
    prefix = lowered.prefix
    return prefix.num_virtual_tokens if isinstance(prefix, KVPrefix | PromptEmbeddings) else 0


def _site_facts(deltas: Sequence[Delta]) -> tuple[SiteFacts, ...]:
    """One entry per kind of site and primitive, in the order of their first layer."""
    groups: dict[tuple[str, str], list[Delta]] = defaultdict(list)
    for delta in deltas:
        site = getattr(delta, "site", None)
        operation = type(delta).__name__
        place = site.kind if site is not None else "lm_head" if "Head" in operation else "embed_tokens"
        groups[place, operation].append(delta)
    return tuple(_group_facts(place, operation, group) for (place, operation), group in groups.items())


def _group_facts(place: str, operation: str, group: Sequence[Delta]) -> SiteFacts:
    sites = [site for delta in group if (site := getattr(delta, "site", None)) is not None]
    shapes: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for delta in group:
        for field in fields(delta):
            value = getattr(delta, field.name)
            if isinstance(value, Tensor):
                shapes[field.name].add(tuple(value.shape))
    # EmbeddingLowRank's A is [V, R]; every other A or D is [R, d_in].
    axis = -1 if operation == "EmbeddingLowRank" else 0
    ranks = {shape[axis] for name in _RANKED for shape in shapes.get(name, ())}
    return SiteFacts(
        site=place,
        operation=operation,
        layers=tuple(sorted({site.layer for site in sites if site.layer >= 0})),
        ranks=tuple(sorted(ranks)),
        shapes={name: tuple(sorted(found)) for name, found in shapes.items()},
    )
