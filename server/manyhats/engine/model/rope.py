"""Rotary embeddings: from a Hugging Face config to frequencies that hold for one maximum context length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from manyhats.engine.errors import ModelError
from manyhats.engine.model.config import RopeConfig

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""``rope_type`` values that are served."""

# These take the length the model was trained on from the config when the parameters don't name it.
_KINDS_WITH_ORIGINAL_LENGTH = ("yarn", "longrope", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSource:
    """What the frequencies are computed from, in the attribute names transformers' functions read.

    Attributes:
        rope_parameters: ``rope_type``, ``rope_theta`` and what the kind needs besides.
        max_position_embeddings: the config's own; not the length to be served.
    """

    rope_parameters: Mapping[str, Any]
    head_dim: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", str(self.rope_parameters["rope_type"]))
        if self.kind not in ROPE_KINDS:
            raise ModelError(f"config.json: rope_type {self.kind!r} is not one of {', '.join(ROPE_KINDS)}")
        factor = self.rope_parameters.get("partial_rotary_factor")
        if factor not in (None, 1, 1.0):
            raise ModelError(f"config.json: partial_rotary_factor {factor} is not supported")
        if self.head_dim % 2:
            raise ModelError(f"config.json: head_dim {self.head_dim} is odd; RoPE needs pairs")

    def standardize_rope_params(self) -> None:
        """Nothing to do: the parameters are standard already. transformers' functions call it."""

    def context_limit(self) -> int:
        """The longest context, in tokens, for which the frequencies are what the model means.

        ``dynamic`` recomputes its frequencies as a sequence grows past ``max_position_embeddings``, which
        leaves keys of other frequencies in the cache; up to there it is the plain RoPE. ``linear`` and
        ``yarn`` stretch the trained length by ``factor``, whether or not ``max_position_embeddings`` says so.
        """
        factor = self.rope_parameters.get("factor") or 1.0
        limit = self.max_position_embeddings
        if self.kind == "linear":
            return int(limit * factor)
        if self.kind == "yarn":
            return max(limit, int(self.rope_parameters["original_max_position_embeddings"] * factor))
        return limit


def rope_source(config: Mapping[str, Any], *, head_dim: int) -> RopeSource:
    """The RoPE of a ``config.json``: ``rope_parameters``, or the older ``rope_scaling`` and ``rope_theta``.

    Raises:
        ModelError: an unknown kind, or parameters that differ by layer type.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    parameters: dict[str, Any] = dict(given)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ModelError("config.json: rope_parameters that differ by layer type are not supported")
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0
    parameters["rope_theta"] = float(theta)
    if "partial_rotary_factor" in config:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if parameters["rope_type"] in _KINDS_WITH_ORIGINAL_LENGTH:
        length = config.get("original_max_position_embeddings")
        if length:
            parameters["original_max_position_embeddings"] = length
        parameters.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return RopeSource(
        rope_parameters=parameters,
        head_dim=head_dim,
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        max_position_embeddings=config["max_position_embeddings"],
    )


def resolve_rope(source: RopeSource, max_context_length: int) -> RopeConfig:
    """Frequencies for every position below ``max_context_length``.

    ``longrope`` has two sets: the long one is taken if ``max_context_length`` exceeds the length the model
    was trained on, the short one otherwise. transformers switches between them by the longest sequence at
    hand, which would leave keys of the other set in the cache.

    Raises:
        ModelError: a parameter is missing or has the wrong type.
    """
    if source.kind == "default":
        exponents = torch.arange(0, source.head_dim, 2, dtype=torch.float32) / source.head_dim
        inv_freq = 1.0 / (source.rope_parameters["rope_theta"] ** exponents)
        return RopeConfig(inv_freq=tuple(inv_freq.tolist()))
    # Imported here: it takes most of a second, and the common kind needs none of it.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    seq_len = max_context_length if source.kind == "longrope" else None
    try:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[source.kind](source, torch.device("cpu"), seq_len=seq_len)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"config.json: rope_parameters of kind {source.kind!r}: {error!r}") from error
    return RopeConfig(inv_freq=tuple(inv_freq.tolist()), attention_scaling=float(scaling))
