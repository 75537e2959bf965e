"""Rotary embeddings: from a Hugging Face config to frequencies that hold for one maximum context length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Rope

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""``rope_type`` values that are served."""

# These take the length the model was trained on from the config when the parameters don't name it.
_KINDS_WITH_ORIGINAL_LENGTH = ("yarn", "longrope", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSource:
    """What the frequencies are computed from, in the attribute names transformers' functions read.

    Attributes:
        rope_parameters: ``rope_type``, ``rope_theta`` and whatever else the kind needs.
        max_position_embeddings: the config's own; not the length to be served.
        allows_partial: whether the family can leave the end of a head as it is.
    """

    rope_parameters: Mapping[str, Any]
    head_dim: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int
    allows_partial: bool = False
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", str(self.rope_parameters["rope_type"]))
        if self.kind not in ROPE_KINDS:
            raise ModelError(f"config.json: rope_type {self.kind!r} is not one of {', '.join(ROPE_KINDS)}")
        factor = self.rope_parameters.get("partial_rotary_factor", 1.0)
        if factor != 1.0 and not self.allows_partial:
            raise ModelError(f"config.json: partial_rotary_factor {factor} is not supported")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            part = "" if factor == 1.0 else f" times partial_rotary_factor {factor}"
            raise ModelError(
                f"config.json: head_dim {self.head_dim}{part} is odd or not part of it; RoPE needs pairs"
            )

    @property
    def rotary_dim(self) -> int:
        """The number of rotated values per head."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    def standardize_rope_params(self) -> None:
        """Nothing to do: the parameters are standard already. transformers' functions call it."""

    def context_limit(self) -> int:
        """The longest context, in tokens, for which the frequencies are the model's own.

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


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE of a ``config.json``: ``rope_parameters``, or the older ``rope_scaling`` and ``rope_theta``.

    Raises:
        ModelError: parameters that differ by layer type.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    parameters: dict[str, Any] = dict(given)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ModelError("config.json: rope_parameters that differ by layer type are not supported")
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0
    parameters["rope_theta"] = float(theta)
    if "partial_rotary_factor" in config:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return parameters


def rope_source(
    config: Mapping[str, Any], parameters: Mapping[str, Any], *, head_dim: int, allows_partial: bool = False
) -> RopeSource:
    """One RoPE of a model, with what its kind needs from the rest of the config.

    Args:
        config: the model's.
        parameters: as in ``rope_parameters``.
        head_dim: K.
        allows_partial: whether the family can rotate a part of the head.

    Raises:
        ModelError: an unknown kind, or an impossible rotated part.
    """
    full = {key: value for key, value in parameters.items() if value is not None}
    full.setdefault("rope_type", full.get("type", "default"))
    if full["rope_type"] in _KINDS_WITH_ORIGINAL_LENGTH:
        length = config.get("original_max_position_embeddings")
        if length:
            full["original_max_position_embeddings"] = length
        full.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return RopeSource(
        rope_parameters=full,
        head_dim=head_dim,
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        max_position_embeddings=config["max_position_embeddings"],
        allows_partial=allows_partial,
    )


def resolve_rope(source: RopeSource, max_context_length: int) -> Rope:
    """Frequencies for every position below ``max_context_length``.

    ``longrope`` has two sets: the long one is used if ``max_context_length`` exceeds the length the model was trained
    on, the short one otherwise. transformers switches between them by the longest current sequence, which would leave
    keys of the other set in the cache.

    Raises:
        ModelError: a parameter is missing or has the wrong type.
    """
    if source.kind == "default":
        exponents = torch.arange(0, source.rotary_dim, 2, dtype=torch.float32) / source.rotary_dim
        inv_freq = 1.0 / (source.rope_parameters["rope_theta"] ** exponents)
        return Rope(inv_freq=tuple(inv_freq.tolist()))
    # Imported here: it takes most of a second, and the common kind needs none of it.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    seq_len = max_context_length if source.kind == "longrope" else None
    try:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[source.kind](source, torch.device("cpu"), seq_len=seq_len)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"config.json: rope_parameters of kind {source.kind!r}: {error!r}") from error
    return Rope(inv_freq=tuple(inv_freq.tolist()), attention_scaling=float(scaling))
