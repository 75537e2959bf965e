"""Prompt tuning: trained embeddings of virtual tokens before the sequence, as PEFT and AdapterHub save it.

Source: Lester et al. 2021 (arXiv:2104.08691), section 2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, AdapterUnsupportedError, shown
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.adapterhub.fields import read_count, refuse_unserved
from manyhats.adapters.formats.adapterhub.places import check_encoder
from manyhats.adapters.formats.adapterhub.tensors import TensorNames, check_shapes, plain_names
from manyhats.adapters.formats.peft.prompt_config import (
    PROMPT_EMBEDDINGS,
    PromptConfig,
    check_fits,
    check_num_virtual_tokens,
    check_shape,
    check_tensor_names,
    parse_prompt_config,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate
from manyhats.adapters.primitives import LoweredAdapter, PromptEmbeddings
from manyhats.adapters.sites import BaseDescription

# How the embeddings were initialised; they are saved as trained.
INITIALISATION_FIELDS = frozenset(
    ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path")
)

# Where transformers applies an architecture's embedding multiplier. PEFT puts the prompt in between: after the
# embedding module, before the decoder's forward.
_MULTIPLIES_IN_EMBEDDING = frozenset(("gemma", "gemma2", "gemma3", "gemma3_text"))
_MULTIPLIES_IN_FORWARD = frozenset(("granite",))

_COMBINATIONS = ("prefix", "prefix_after_bos")
_KNOWN = frozenset(
    (
        "architecture",
        "prompt_length",
        "combine",
        # How the embeddings were initialised; they are saved as trained.
        "prompt_init",
        "prompt_init_text",
        "random_uniform_scale",
        "init_weights_seed",
    )
)


def as_first_layer_reads(prompt: Tensor, base: BaseDescription) -> Tensor:
    """A stored prompt with the embedding multiplier, where transformers would apply it to a prompt too.

    The Gemmas multiply inside the embedding module, so their prompts are read as stored; Granite multiplies
    whatever enters its forward.

    Args:
        prompt: [P, D].
        base: whose architecture decides.

    Returns:
        [P, D]; float32 if it was multiplied, else as given.

    Raises:
        AdapterUnsupportedError: the architecture multiplies, but it is not known where.
    """
    if base.embedding_scale == 1.0 or base.model_type in _MULTIPLIES_IN_EMBEDDING:
        return prompt
    if base.model_type in _MULTIPLIES_IN_FORWARD:
        return prompt.float() * base.embedding_scale
    raise AdapterUnsupportedError(
        "peft_type", f"virtual tokens are not served on {shown(base.model_type)}, which multiplies embeddings"
    )


class Prompts:
    """What methods share whose virtual tokens are vectors."""

    def check_base(self, base: BaseDescription) -> None:
        """Refuse a base that multiplies embeddings where that is not known of prompts."""
        as_first_layer_reads(torch.empty(0, base.embedding_size), base)


@dataclass(frozen=True, slots=True)
class PromptTuningMethod(Prompts):
    """Prompt tuning from a PEFT directory."""

    @property
    def method(self) -> AdapterMethod:
        """PROMPT_TUNING."""
        return AdapterMethod.PROMPT_TUNING

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse embeddings whose size is not the base's."""
        check_plain_prompt(candidate, base, limits, INITIALISATION_FIELDS)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """The embeddings."""
        return lower_plain_prompt(artifact, base, INITIALISATION_FIELDS)


@dataclass(frozen=True, slots=True)
class AdapterHubPromptMethod:
    """Prompt tuning from an AdapterHub directory, on encoders.

    The vectors enter behind the norm of the embeddings, with neither position nor type; real token t has position t.
    With ``combine`` "prefix" the first of them is the first row, which heads read; with "prefix_after_bos" that is the
    text's own. Otherwise it does not matter to an encoder where they stand, as every row sees all others.
    """

    @property
    def method(self) -> AdapterMethod:
        """PROMPT_TUNING."""
        return AdapterMethod.PROMPT_TUNING

    def check_base(self, base: BaseDescription) -> None:
        """Refuse decoders."""
        check_encoder(base, "architecture", "AdapterHub's prompt tuning, which its decoders do not have")

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: no tensor missing, left over or of another shape."""
        self.check_base(base)
        config = _read_config(candidate.config, base)
        if config.num_virtual_tokens > limits.max_virtual_tokens:
            raise AdapterTooLargeError(
                "prompt_length", f"is {config.num_virtual_tokens}; the limit is {limits.max_virtual_tokens}"
            )
        _check_tensor(config, candidate.shapes, base)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """The embeddings, in their stored dtype."""
        self.check_base(base)
        config = _read_config(artifact.config, base)
        shapes = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
        names = _check_tensor(config, shapes, base)
        prompt = PromptEmbeddings(
            names.pick(artifact.tensors, config.tensor), are_normed=True, are_read=config.is_first
        )
        return LoweredAdapter(digest=artifact.digest, deltas=(), prefix=prompt)


@dataclass(frozen=True, slots=True)
class _Config:
    """The fields that determine the maths; ``tensor`` is the plain name of the one tensor."""

    num_virtual_tokens: int
    is_first: bool
    tensor: str


def _read_config(outer: Mapping[str, Any], base: BaseDescription) -> _Config:
    adapterhub_format.check_base(outer, base)
    config = adapterhub_format.method_config(outer)
    refuse_unserved(config, known=_KNOWN, refused={})
    combine = config.get("combine", _COMBINATIONS[0])
    if combine not in _COMBINATIONS:
        raise AdapterUnsupportedError(
            "combine", f"is '{shown(str(combine))}'; these are served: {', '.join(_COMBINATIONS)}"
        )
    name = adapterhub_format.adapter_name(outer)
    return _Config(
        num_virtual_tokens=read_count(config, "prompt_length", 10),
        is_first=combine == _COMBINATIONS[0],
        tensor=f"prompt_tuning.prompt_tunings.{name}.prompt_embedding.weight",
    )


def _check_tensor(
    config: _Config, shapes: Mapping[str, tuple[int, ...]], base: BaseDescription
) -> TensorNames:
    names = plain_names(shapes, base)
    check_shapes(names, shapes, {config.tensor: (config.num_virtual_tokens, base.embedding_size)}, base)
    return names


def check_plain_prompt(
    candidate: Candidate, base: BaseDescription, limits: AdapterLimits, own_fields: Collection[str]
) -> None:
    """Check an artifact that holds the prompt's embeddings and nothing else.

    Raises:
        ArtifactError, BaseMismatchError: it does not, or does not fit.
    """
    config = parse_prompt_config(candidate.config, own_fields)
    check_num_virtual_tokens(config, limits)
    check_tensor_names(candidate.shapes, (PROMPT_EMBEDDINGS,))
    check_prompt(config, candidate.shapes[PROMPT_EMBEDDINGS], base, candidate.base_model)


def lower_plain_prompt(
    artifact: AdapterArtifact, base: BaseDescription, own_fields: Collection[str]
) -> LoweredAdapter:
    """Lower an artifact that holds the prompt's embeddings and nothing else.

    Raises:
        ArtifactError, BaseMismatchError: as ``check_plain_prompt``.
    """
    shapes: Mapping[str, Any] = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
    check_tensor_names(shapes, (PROMPT_EMBEDDINGS,))
    config = parse_prompt_config(artifact.config, own_fields)
    check_prompt(config, shapes[PROMPT_EMBEDDINGS], base, artifact.base_model)
    embeddings = as_first_layer_reads(artifact.tensors[PROMPT_EMBEDDINGS], base)
    return LoweredAdapter(digest=artifact.digest, deltas=(), prefix=PromptEmbeddings(embeddings))


def check_prompt(
    config: PromptConfig, shape: tuple[int, ...], base: BaseDescription, base_model: str
) -> None:
    """Check that the embeddings are [P, D], D the base's hidden size.

    Raises:
        BaseMismatchError: they are another base's.
        AdapterInvalidError: they contradict their config, or the base that they name.
    """
    Prompts().check_base(base)
    if len(shape) != 2:
        raise AdapterInvalidError(PROMPT_EMBEDDINGS, f"has {len(shape)} dimensions; expected 2")
    check_fits("token_dim", config.token_dim, base.embedding_size, base, base_model)
    check_fits("num_layers", config.num_layers, base.depth, base, base_model)
    if config.token_dim is None:
        check_fits(PROMPT_EMBEDDINGS, shape[1], base.embedding_size, base, base_model)
    check_shape(PROMPT_EMBEDDINGS, shape, (config.num_virtual_tokens, base.embedding_size))
