"""What is fuzzed: bytes of a caller's files, which must end in a value or in an ``AdapterError``, in nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fuzzing.mutators import Mutate, mutated_json, mutated_safetensors
from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.formats.json_reader import parse_json_object
from manyhats.adapters.formats.recognition import recognise, recorded_base
from manyhats.adapters.formats.safetensors_reader import LENGTH_BYTES, header_size, parse_header, read_tensors
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import check_lowered, lower, method_of
from manyhats.adapters.method import Candidate
from manyhats.adapters.sites import Site
from support.factories.adapters import make_base
from support.factories.every_method import PLAIN, Sizes


class _Weights:
    """Weights of the base, for the methods that need them."""

    def linear(self, site: Site) -> tuple[Tensor, Tensor | None]:
        base = make_base()
        d_in, d_out = base.linears.get(site.name, (base.embedding_size, base.vocab_size))
        return torch.linspace(-1, 1, d_out * d_in).reshape(d_out, d_in), None

    def pooler_norm(self) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


BASE = make_base(is_tied=False, weights=_Weights())
LIMITS = AdapterLimits()
FILE = "adapter_model.safetensors"


Mutator = Callable[[bytes, Random, Sequence[str], Mutate], bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """One reader, how its inputs are changed, what they begin with, and the words of its language."""

    name: str
    run: Callable[[bytes], None]
    mutate: Mutator
    seeds: tuple[bytes, ...]
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A good adapter of one method."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_json(data: bytes) -> None:
    """The JSON reader alone: what passes is an object that can be written again."""
    try:
        value = parse_json_object(
            data, "config", max_bytes=LIMITS.max_config_bytes, max_depth=LIMITS.max_config_depth
        )
    except AdapterError:
        return
    assert isinstance(value, dict)
    assert json.loads(json.dumps(value, allow_nan=False).encode("utf-8")) == value


def read_safetensors(data: bytes) -> None:
    """The safetensors reader: what passes takes the file's bytes, each once."""
    try:
        size = header_size(data[:LENGTH_BYTES], len(data), FILE, LIMITS)
        header = parse_header(data[:size], len(data), FILE, LIMITS)
        tensors = read_tensors(header, bytearray(data))
    except AdapterError:
        return
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == len(data) - size


def read_config(data: bytes) -> None:
    """A config beside the tensors of a good adapter of its method: all that a registration does with its fields."""
    try:
        config = parse_json_object(
            data, "config", max_bytes=LIMITS.max_config_bytes, max_depth=LIMITS.max_config_depth
        )
        method, base_model = recognise(config), recorded_base(config)
        reader = method_of(method, config)
    except AdapterError:
        return
    for sample in samples_of(method):
        shapes = {name: tuple(tensor.shape) for name, tensor in sample.tensors.items()}
        try:
            reader.check(Candidate(config, shapes, base_model), BASE, LIMITS)
        except AdapterError:
            continue
        lower_or_refuse(config, method, sample.tensors)


def lower_or_refuse(config: Mapping[str, Any], method: AdapterMethod, tensors: Mapping[str, Tensor]) -> None:
    """The steps of a registration behind the checks of header and config."""
    artifact = AdapterArtifact(
        digest="sha256:" + "0" * 64,
        method=method,
        config=config,
        tensors=tensors,
        base_model="",
        size_bytes=0,
        num_parameters=0,
    )
    try:
        check_lowered(lower(artifact, BASE))
    except AdapterError:
        return


@cache
def samples() -> tuple[Sample, ...]:
    """One adapter of every method and format."""
    with tempfile.TemporaryDirectory() as directory:
        return tuple(_sample(Path(directory) / name, name) for name in PLAIN)


def samples_of(method: AdapterMethod) -> tuple[Sample, ...]:
    """Those of one method."""
    return tuple(sample for sample in samples() if PLAIN[sample.name][0] is method)


def _sample(directory: Path, name: str) -> Sample:
    PLAIN[name][1](directory, BASE, Sizes(rank=2, num_virtual_tokens=3))
    config = json.loads((directory / "adapter_config.json").read_text())
    (weights,) = directory.glob("*.safetensors")
    return Sample(name, config, load_file(weights))


def _words(values: Iterable[Any]) -> set[str]:
    """Every key and text in JSON values."""
    found: set[str] = set()
    for value in values:
        if isinstance(value, dict):
            found |= set(value) | _words(value.values())
        elif isinstance(value, list):
            found |= _words(value)
        elif isinstance(value, str):
            found.add(value)
    return found


@cache
def targets() -> Mapping[str, Target]:
    """All targets by name."""
    configs = [json.dumps(sample.config).encode() for sample in samples()]
    small = [{name: tensor[:1] for name, tensor in list(sample.tensors.items())[:2]} for sample in samples()]
    syntax = ("{", "}", "[", "]", ":", ",", '"', "null", "true", "NaN", "-1", "1e999", "\\ud800", "\\u0061")
    header = ("dtype", "shape", "data_offsets", "__metadata__", "F32", "BF16", "F16", "I64", "PK\\x03\\x04")
    words = tuple(sorted(_words(sample.config for sample in samples())))
    return {
        each.name: each
        for each in (
            Target("json", read_json, mutated_json, tuple(configs), syntax),
            Target("config", read_config, mutated_json, tuple(configs), (*syntax, *words)),
            Target(
                "safetensors",
                read_safetensors,
                mutated_safetensors,
                tuple(map(save, small)),
                (*syntax, *header),
            ),
        )
    }
