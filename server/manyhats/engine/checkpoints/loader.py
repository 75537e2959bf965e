"""From a name to a model in memory: find the checkpoint, quantize it or load it from the cache, assemble."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog
import torch
from torch import Tensor

from manyhats.adapters.formats.base_name import has_form_of_path
from manyhats.adapters.heads import Pooling
from manyhats.adapters.sites import EMBEDDING, HEAD, BaseDescription, Site
from manyhats.engine.checkpoints.checkpoint import (
    SafetensorsDirectory,
    assemble_weights,
    check_quantization_config,
    check_tensors,
    read_json,
)
from manyhats.engine.checkpoints.fetch import locate_model
from manyhats.engine.checkpoints.found import FoundCheckpoint, find_checkpoint
from manyhats.engine.checkpoints.identity import FileDigests
from manyhats.engine.checkpoints.nf4_cache import Nf4Cache, quantize_checkpoint
from manyhats.engine.checkpoints.stacked import with_experts_apart
from manyhats.engine.errors import ModelError
from manyhats.engine.home import default_home
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.describe import describe
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Linear, Weights
from manyhats.engine.progress import Progress, no_progress
from manyhats.engine.text.task_text import TaskTexts
from manyhats.engine.text.text_process import TextProcesses
from manyhats.engine.text.tokenizer import Tokenizer

__all__ = [
    "GenerationDefaults",
    "LoadedModel",
    "Progress",
    "Quantization",
    "default_home",
    "load_model",
    "usual_quantization",
]

_log = structlog.get_logger(__name__)

Quantization = Literal["nf4", "none"]
# Below it, what NF4 saves is little beside the embeddings, and what it changes is much: of MiniLM's 45 MB it saves 15,
# and its vectors then have a cosine of 0.969 with the exact ones.
_MIN_PARAMETERS_OF_NF4 = 100_000_000


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """How a generation ends, according to the model's files; EOS ids may be empty."""

    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LoadedModel:
    """A base model in memory, ready for the decoder.

    Attributes:
        description: what adapters are checked against; its digest names weights and quantization.
        name: what to call it: the alias, hub id, or the directory's name.
        reference: how transformers and PEFT load it: the hub id, or the directory's absolute path.
        quantization: of the layers' linears.
        usual_quantization: that of ``auto``.
        texts: reads the chat templates and tokens that adapters bring.
    """

    architecture: Architecture
    weights: Weights
    tokenizer: Tokenizer
    description: BaseDescription
    generation: GenerationDefaults
    name: str
    reference: str
    quantization: Quantization
    usual_quantization: Quantization
    texts: TaskTexts

    @property
    def padding_id(self) -> int | None:
        """The padding of an encoder whose positions begin behind its id, as RoBERTa's do; None for others."""
        positions = self.architecture.embedding.positions
        is_counted = positions is None or not positions.offset or not self.architecture.attention.sees_all
        return None if is_counted else self.description.pad_token_id


def load_model(
    source: str,
    *,
    quantization: Quantization | Literal["auto"],
    dtype: torch.dtype,
    names: Iterable[str] = (),
    max_context_length: int | None = None,
    progress: Progress = no_progress,
    home: Path | None = None,
) -> LoadedModel:
    """Load a base model.

    Args:
        source: an alias (``smollm2-135m-instruct``), a local Hugging Face directory, or a hub id.
        quantization: ``nf4`` keeps the layers' linears in NF4, quantized once and cached; ``none`` keeps them
            dense (an NF4 checkpoint is then dequantized); ``auto`` is ``nf4`` for an NF4 checkpoint, and where these
            linears have 100 million parameters or more.
        dtype: float32 or bfloat16, for dense matrices. With ``nf4``, embedding and output head are bfloat16 unless it
            is float32.
        names: other names adapters may know this base by.
        max_context_length: prompt and output tokens together; None for the model's own maximum, or for what its
            sentence-transformers files say.
        progress: called during each stage.
        home: where fetched models and the cache are kept; None for ``default_home()``.

    Raises:
        ModelError: the model cannot be found, fetched, read or served; says why.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(f"dtype must be float32 or bfloat16, not {dtype}")
    home = default_home() if home is None else home
    located = locate_model(source, home, progress)
    digests = FileDigests(home / "digests")
    found = find_checkpoint(located.directory, max_context_length, digests)
    usual = usual_quantization(
        found.family.architecture, is_stored_nf4=check_quantization_config(found.config)
    )
    if quantization == "auto":
        quantization = usual
    tensors = _read_tensors(found, quantization, Nf4Cache(home / "nf4", digests), progress)
    tokenizer = Tokenizer.from_directory(located.directory)
    family = found.family.in_dtype(dtype)
    weights = assemble_weights(
        tensors, family, dtype=dtype, keep_nf4=quantization == "nf4", progress=progress
    )
    digest = _base_digest(found.digest, quantization)
    texts = TaskTexts(tokenizer, TextProcesses())
    return LoadedModel(
        architecture=family.architecture,
        weights=weights,
        tokenizer=tokenizer,
        description=describe(
            family,
            names={*located.names, *names, *_recorded_name(found.config)},
            digest=digest,
            pad_token_id=_pad_token_id(found.config),
            pooling=_pooling(found),
            weights=ModelWeightSource(digest, weights),
            check_text=texts.check,
            has_pooler="pooler" in weights.outer,
        ),
        generation=_generation_defaults(found, tokenizer),
        name=located.name,
        reference=located.reference,
        quantization=quantization,
        usual_quantization=usual,
        texts=texts,
    )


def usual_quantization(architecture: Architecture, *, is_stored_nf4: bool) -> Quantization:
    """That of ``auto``."""
    is_large = architecture.num_linear_parameters() >= _MIN_PARAMETERS_OF_NF4
    return "nf4" if is_stored_nf4 or is_large else "none"


def _read_tensors(
    found: FoundCheckpoint, quantization: Quantization, cache: Nf4Cache, progress: Progress
) -> Mapping[str, Tensor]:
    """The checked tensors of a checkpoint: as they are, or with NF4 linears, from the cache if it has them."""
    quantizes = quantization == "nf4" and not check_quantization_config(found.config)
    tensors = cache.load(found.digest) if quantizes else None
    if tensors is None:
        tensors = with_experts_apart(SafetensorsDirectory(found.directory), found.family)
        if quantizes:
            tensors = quantize_checkpoint(tensors, found.family, progress)
            cache.store(found.digest, tensors, found.config)
    check_tensors(tensors, found.family)
    return tensors


def _base_digest(checkpoint_digest: str, quantization: Quantization) -> str:
    return "sha256:" + hashlib.sha256(f"{checkpoint_digest} {quantization}\n".encode()).hexdigest()


def _recorded_name(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The hub id that the checkpoint was saved under, if its config has one; a path does not count."""
    name = config.get("_name_or_path")
    return (name,) if isinstance(name, str) and not has_form_of_path(name) else ()


def _generation_defaults(found: FoundCheckpoint, tokenizer: Tokenizer) -> GenerationDefaults:
    """EOS ids from ``generation_config.json``, else ``config.json``; plus the tokenizer's, which any file may name."""
    path = found.directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    vocab_size = found.family.architecture.vocab_size
    ids: frozenset[int] = frozenset()
    for source, value in (
        ("generation_config.json: eos_token_id", generation.get("eos_token_id")),
        ("config.json: eos_token_id", found.config.get("eos_token_id")),
    ):
        ids = ids or _known_token_ids(value if isinstance(value, list) else [value], vocab_size, source)
    own = _known_token_ids([tokenizer.special_token_id("eos_token")], vocab_size, "the tokenizer: eos_token")
    return GenerationDefaults(eos_token_ids=ids | own)


def _pooling(found: FoundCheckpoint) -> Pooling:
    """How texts are pooled: as the model's files say, else the mean, or a decoder's last row."""
    default = Pooling.LAST if found.family.architecture.head is not None else Pooling.MEAN
    return found.sentences.pooling or default


def _pad_token_id(config: Mapping[str, Any]) -> int | None:
    value = config.get("pad_token_id")
    return value if type(value) is int else None


def _known_token_ids(ids: Iterable[object], vocab_size: int, source: str) -> frozenset[int]:
    """Those ids that are tokens of the model; any others are dropped with a log line.

    Args:
        ids: as a file has them; None means none.
        vocab_size: token ids are below.
        source: the file and field they come from, for the log line.
    """
    given = [each for each in ids if each is not None]
    known = [each for each in given if type(each) is int and 0 <= each < vocab_size]
    if len(known) < len(given):
        unknown = [each for each in given if each not in known]
        _log.warning(
            "ids that are not tokens of the model are dropped",
            source=source,
            ids=unknown[:20],
            limit=vocab_size,
        )
    return frozenset(known)


@dataclass(frozen=True, slots=True)
class ModelWeightSource:
    """A ``WeightSource`` over a loaded model; it keeps nothing that it dequantizes.

    Attributes:
        digest: of the base; two sources of one base are equal.
        weights: the model's.
    """

    digest: str
    weights: Weights = field(compare=False, repr=False)

    def linear(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """Weight [d_out, d_in] and bias [d_out] or None, float32, of a layer's linear, the embedding or ``lm_head``.

        Raises:
            ModelError: the site is not a linear of this model.
        """
        linear = self._linear(site)
        if linear is None:
            raise ModelError(f"{site} is not a linear of this model")
        matrix, bias = linear.matrix, linear.bias
        weight = matrix.dequantize() if isinstance(matrix, Nf4Weight) else matrix.float()
        return weight, None if bias is None else bias.float()

    def pooler_norm(self) -> tuple[Tensor, Tensor | None]:
        """Weight [D] and bias [D] or None, float32, of the norm behind the pooler.

        Raises:
            ModelError: this model has none.
        """
        norm = self.weights.pooler_norm
        if norm is None:
            raise ModelError("this model has no norm behind its pooler")
        return norm.weight, norm.bias

    def _linear(self, site: Site) -> Linear | None:
        if site == EMBEDDING:
            return Linear(self.weights.embedding)
        if site == HEAD:
            return self.weights.head
        if site.layer < 0:
            return self.weights.outer.get(site.name)
        sets = self.weights.sets
        return sets[site.layer].linears.get(site.name) if site.layer < len(sets) else None
